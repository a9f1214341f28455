"""Phi-4-mini: an array of JSON objects behind ``functools`` or between special tokens."""

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import json_calls
from jaxllm.parsers.reader import Markers, Reader, Steps

FUNCTOOLS, OPEN, CLOSE = "functools[", "<|tool_call|>", "<|/tool_call|>"
_OPEN = Markers(FUNCTOOLS, OPEN)


def _grammar(r: Reader) -> Steps[None]:
    while (yield from r.content_until(_OPEN)):
        with r.attempt():
            if not (yield from r.accept(OPEN)):
                yield from r.expect("functools")
            yield from r.spaces()
            yield from json_calls(r)
        yield from r.closing(CLOSE)


PHI4 = ToolParser(
    _grammar,
    CallForm(
        opening="functools[",
        begin='{"name": "',
        before_arguments='", "arguments": ',
        end="}",
        separator=", ",
        closing="]",
        trigger=FUNCTOOLS,
    ),
    special_tokens=True,
)
