"""Llama 3.2 and 4, ToolACE and others: the whole answer is a Python list of calls."""

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.python_calls import python_calls
from jaxllm.parsers.reader import Markers, Reader, Steps

START, END = "<|python_start|>", "<|python_end|>"
_START = Markers(START)


def _grammar(r: Reader) -> Steps[None]:
    with r.attempt():
        yield from _calls(r)
    yield from r.closing(END)
    while (yield from r.content_until(_START)):
        with r.attempt():
            yield from _calls(r)
        yield from r.closing(END)


def _calls(r: Reader) -> Steps[None]:
    yield from r.spaces()
    yield from r.accept(START)
    yield from r.spaces()
    yield from python_calls(r)


PYTHONIC = ToolParser(
    _grammar,
    CallForm(
        opening="[",
        begin="",
        before_arguments="(",
        end=")",
        separator=", ",
        closing="]",
        arguments="python",
    ),
    special_tokens=True,
)
