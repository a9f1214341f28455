"""Calls as Python writes them: ``[f(a=1, b="x"), g()]``. Literals become JSON while they come.

A grammar of its own instead of ``ast``: a model's text is never evaluated, nor given to a parser
that recurses.
"""

import json
import re
from collections import deque
from collections.abc import Sequence

from jaxllm.parsers.json_text import hex_digits, unicode_escape
from jaxllm.parsers.reader import Emit, Mismatch, Reader, Steps

MAX_DEPTH = 64  # of containers in one another
MAX_PIECES = 1 << 15  # of a literal that is read at once: 0.2 s of the event loop

_FUNCTION = re.compile(r"[A-Za-z0-9_.-]+")
_KEYWORD = re.compile(r"[A-Za-z0-9_]+")
_ATOM = re.compile(r"[A-Za-z0-9_.+-]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_PLAIN = {quote: re.compile(rf"[^{quote}\\]+") for quote in "'\""}
_WORDS = {"True": "true", "False": "false", "None": "null"}
_WORDS |= {word: word for word in _WORDS.values()}
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "0": "\0"}
_ESCAPES |= {"\\": "\\", "'": "'", '"': '"', "\n": ""}
_BRACKETS = {"[": ("]", "[", "]"), "(": (")", "[", "]"), "{": ("}", "{", "}")}


def python_calls(r: Reader) -> Steps[None]:
    """A list of calls of declared tools."""
    yield from r.expect("[")
    while True:
        yield from r.spaces()
        yield from _call(r)
        yield from r.spaces()
        if not (yield from r.accept(",")):
            yield from r.expect("]")
            return


def _call(r: Reader) -> Steps[None]:
    name = yield from r.word(_FUNCTION)
    if name not in r.tools:
        raise Mismatch
    yield from r.expect("(")
    yield from r.spaces()
    before = "{"
    while not (yield from r.accept(")")):
        keyword = yield from r.word(_KEYWORD)
        yield from r.spaces()
        yield from r.expect("=")
        if before == "{":
            r.start_call(name)
        r.arguments(f"{before}{json.dumps(keyword)}: ")
        before = ", "
        yield from python_value(r, r.arguments)
        yield from r.spaces()
        if not (yield from r.accept(",")):
            yield from r.expect(")")
            break
        yield from r.spaces()
    if before == "{":
        r.call(name, "{}")
    else:
        r.arguments("}")
        r.end_call()


def python_value(r: Reader, emit: Emit) -> Steps[None]:
    """A literal as JSON. Raises Mismatch for what JSON cannot say."""
    due: list[Sequence[str]] = []  # of each open container: its closing bracket, ours for it
    while True:
        yield from r.spaces()
        opening = yield from r.peek()
        if opening in _BRACKETS and opening:
            yield from r.take()
            closing, ours, ours_closing = _BRACKETS[opening]
            emit(ours)
            due.append((closing, ours_closing))
            if len(due) > MAX_DEPTH:
                raise Mismatch
            yield from r.spaces()
            if not (yield from r.sees(closing)):
                if closing == "}":
                    yield from _key(r, emit)
                continue
        else:
            yield from _scalar(r, emit)
        while due:
            yield from r.spaces()
            closing, ours_closing = due[-1]
            if (yield from r.accept(",")):
                yield from r.spaces()
                if not (yield from r.sees(closing)):
                    emit(", ")
                    if closing == "}":
                        yield from _key(r, emit)
                    break
            yield from r.expect(closing)
            emit(ours_closing)
            due.pop()
        if not due:
            return


def literal_as_json(text: str) -> str:
    """A literal that is all of ``text``, as JSON; "" if it is none, or has more than MAX_PIECES."""
    reader, pieces = Reader({}), list[str]()
    reader.add(text)
    reader.end()

    def add(piece: str) -> None:
        if len(pieces) == MAX_PIECES:
            raise Mismatch
        pieces.append(piece)

    def whole() -> Steps[None]:
        yield from python_value(reader, add)
        if (yield from reader.peek()):
            raise Mismatch

    try:
        deque(whole(), 0)
    except Mismatch:
        return ""
    return "".join(pieces)


def _key(r: Reader, emit: Emit) -> Steps[None]:
    """A string, a colon; the value comes next."""
    yield from _string(r, emit)
    yield from r.spaces()
    yield from r.expect(":")
    emit(": ")


def _scalar(r: Reader, emit: Emit) -> Steps[None]:
    if (yield from r.peek()) in ("'", '"'):
        yield from _string(r, emit)
        return
    atom = yield from r.word(_ATOM)
    if atom not in _WORDS and not _NUMBER.fullmatch(atom):
        raise Mismatch
    emit(_WORDS.get(atom, atom))


def _string(r: Reader, emit: Emit) -> Steps[None]:
    quote = yield from r.take()
    if quote not in _PLAIN:
        raise Mismatch
    emit('"')
    while not (yield from r.accept(quote)):
        part = yield from r.run(_PLAIN[quote])
        emit(escaped(part or (yield from _escape(r))))
    emit('"')


def _escape(r: Reader) -> Steps[str]:
    yield from r.expect("\\")
    letter = yield from r.take()
    if letter == "x":
        return chr((yield from hex_digits(r, 2)))
    if letter == "u":
        return (yield from unicode_escape(r))
    return _ESCAPES.get(letter, f"\\{letter}")


def escaped(text: str) -> str:
    """As it stands in a JSON string; any piece of a text by itself."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
