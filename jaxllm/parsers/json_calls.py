"""Calls as JSON objects: ``{"name": "f", "arguments": {...}}``, alone or in an array."""

from collections.abc import Callable

from jaxllm.parsers.json_text import decoded_string, string, structure, value
from jaxllm.parsers.machine import Grammar
from jaxllm.parsers.reader import Emit, Markers, Mismatch, Reader, Steps

ARGUMENTS = ("arguments", "parameters")


def json_call(r: Reader, *, known: bool = False) -> Steps[None]:
    """One call, its name and arguments in any order; other keys are passed over.

    ``known``: nothing around it says that it is a call, so it must name a declared tool and have
    arguments.
    """
    name: str | None = None
    arguments: str | None = None
    yield from r.expect("{")
    while True:
        key = yield from _key(r)
        if key == "name" and name is None:
            name = yield from _name(r, known)
        elif key in ARGUMENTS and arguments is None:
            if name is not None:
                yield from _send(r, name)
                break
            pieces: list[str] = []
            yield from json_arguments(r, pieces.append)
            arguments = "".join(pieces)
        else:
            yield from value(r)
        yield from r.spaces()
        if name is not None and arguments is not None:
            r.call(name, arguments)
            break
        if not (yield from r.accept(",")):
            yield from r.expect("}")
            if name is None or known:
                raise Mismatch
            r.call(name, "{}")
            return
    yield from _tail(r)


def json_calls(r: Reader, *, known: bool = False) -> Steps[None]:
    """An array of calls, or a single one."""
    if not (yield from r.accept("[")):
        yield from json_call(r, known=known)
        return
    while True:
        yield from r.spaces()
        yield from json_call(r, known=known)
        yield from r.spaces()
        if not (yield from r.accept(",")):
            yield from r.expect("]")
            return


def calls_between(
    *openings: str, closing: str, body: Callable[[Reader], Steps[None]] = json_calls
) -> Grammar:
    """``body`` between any of ``openings`` and ``closing``, as often as it comes."""
    first = Markers(*openings)
    *others, last = openings

    def grammar(r: Reader) -> Steps[None]:
        while (yield from r.content_until(first)):
            with r.attempt():
                for opening in others:
                    if (yield from r.accept(opening)):
                        break
                else:
                    yield from r.expect(last)
                yield from r.spaces()
                yield from body(r)
            yield from r.closing(closing)

    return grammar


def json_arguments(r: Reader, emit: Emit) -> Steps[None]:
    """An object; a string that holds its text, as some models write it; or null for none."""
    first = yield from r.peek()
    if first == "{":
        yield from structure(r, emit)
    elif first == '"':
        yield from decoded_string(r, emit)
    else:
        yield from r.expect("null")
        emit("{}")


def _send(r: Reader, name: str) -> Steps[None]:
    if (yield from r.peek()) not in ("{", '"') and not (yield from r.sees("null")):
        raise Mismatch
    r.start_call(name)
    yield from json_arguments(r, r.arguments)
    r.end_call()


def _key(r: Reader) -> Steps[str]:
    yield from r.spaces()
    key = yield from string(r)
    yield from r.spaces()
    yield from r.expect(":")
    yield from r.spaces()
    return key


def _name(r: Reader, known: bool) -> Steps[str]:
    name = yield from string(r)
    if not name or (known and name not in r.tools):
        raise Mismatch
    return name


def _tail(r: Reader) -> Steps[None]:
    """The rest of the object. A model that forgets its bracket has called all the same."""
    yield from r.spaces()
    while (yield from r.accept(",")):
        yield from _key(r)
        yield from value(r)
        yield from r.spaces()
    yield from r.accept("}")
