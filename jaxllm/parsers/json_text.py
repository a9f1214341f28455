"""JSON as models write it, passed on or decoded while it comes.

Only strings and brackets are understood, so time and memory do not depend on what is nested in
what. A raw control character in a string, such as the end of a line of code, is escaped as JSON
demands; everything else stays as it was written.
"""

import re

from jaxllm.parsers.reader import Emit, Mismatch, Reader, Steps

_PLAIN = re.compile(r'[^"\\]+')  # in a string
_BETWEEN = re.compile(r"[\sA-Za-z0-9,:.+-]+")  # of strings and brackets
_SCALAR = re.compile(r"[A-Za-z0-9.+-]+")
_OPENING, _CLOSING = re.compile(r"[\[{]+"), re.compile(r"[\]}]+")
_HEX = re.compile(r"[0-9A-Fa-f]+")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", '"': '"', "\\": "\\"}
_CONTROLS = {code: f"\\u{code:04x}" for code in range(0x20)} | {
    ord(char): f"\\{letter}" for letter, char in _ESCAPES.items() if char < " "
}
REPLACEMENT = "\ufffd"  # for half a surrogate pair


def structure(r: Reader, emit: Emit) -> Steps[None]:
    """The object or array that begins here, to its last bracket."""
    depth = 0
    while True:
        if (yield from r.peek()) == '"':
            yield from raw_string(r, emit)
        elif part := (yield from r.run(_OPENING)):
            depth += len(part)
            emit(part)
        elif depth and (part := (yield from r.run(_CLOSING, depth))):
            depth -= len(part)
            emit(part)
        elif depth and (part := (yield from r.run(_BETWEEN))):
            emit(part)
        else:
            raise Mismatch
        if not depth:
            return


def raw_string(r: Reader, emit: Emit) -> Steps[None]:
    """A string with its quotes and escapes."""
    yield from r.expect('"')
    emit('"')
    while True:
        if part := (yield from r.run(_PLAIN)):
            emit(part.translate(_CONTROLS))
        elif (yield from r.accept('"')):
            emit('"')
            return
        else:
            yield from r.expect("\\")
            char = yield from r.take()
            emit(_CONTROLS.get(ord(char)) or f"\\{char}")


def decoded_string(r: Reader, emit: Emit) -> Steps[None]:
    """What a string says."""
    yield from r.expect('"')
    while True:
        if part := (yield from r.run(_PLAIN)):
            emit(part)
        elif (yield from r.accept('"')):
            return
        else:
            yield from r.expect("\\")
            char = yield from r.take()
            emit((yield from unicode_escape(r)) if char == "u" else _ESCAPES.get(char, char))


def string(r: Reader) -> Steps[str]:
    pieces: list[str] = []
    yield from decoded_string(r, pieces.append)
    return "".join(pieces)


def value(r: Reader) -> Steps[None]:
    """Pass over a value of any kind."""
    first = yield from r.peek()
    if first == '"':
        yield from raw_string(r, _nowhere)
    elif first in ("{", "["):
        yield from structure(r, _nowhere)
    else:
        yield from r.word(_SCALAR)


def unicode_escape(r: Reader) -> Steps[str]:
    """The character of ``\\uXXXX``, of which ``\\u`` is read; two of them may make one."""
    code = yield from hex_digits(r, 4)
    if 0xD800 <= code < 0xDC00 and (yield from r.sees("\\u")):
        yield from r.expect("\\u")
        low = yield from hex_digits(r, 4)
        if 0xDC00 <= low < 0xE000:
            return chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00))
        return REPLACEMENT + _character(low)
    return _character(code)


def hex_digits(r: Reader, count: int) -> Steps[int]:
    digits = ""
    while len(digits) < count:
        part = yield from r.run(_HEX, count - len(digits))
        if not part:
            raise Mismatch
        digits += part
    return int(digits, 16)


def _character(code: int) -> str:
    return REPLACEMENT if 0xD800 <= code < 0xE000 or code > 0x10FFFF else chr(code)


def _nowhere(text: str) -> None:
    pass
