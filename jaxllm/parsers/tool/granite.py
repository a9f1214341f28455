"""Granite 3: a marker, then an array of JSON objects. Granite 4: as Hermes."""

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import json_calls
from jaxllm.parsers.reader import Markers, Reader, Steps

TOKEN, TAG, CLOSE = "<|tool_call|>", "<tool_call>", "</tool_call>"
_OPEN = Markers(TOKEN, TAG)


def _grammar(r: Reader) -> Steps[None]:
    while (yield from r.content_until(_OPEN)):
        with r.attempt():
            if not (yield from r.accept(TOKEN)):
                yield from r.expect(TAG)
            yield from r.spaces()
            yield from json_calls(r)
        yield from r.closing(CLOSE)


GRANITE = ToolParser(
    _grammar,
    CallForm(
        opening="<|tool_call|>[",
        begin='{"name": "',
        before_arguments='", "arguments": ',
        end="}",
        separator=", ",
        closing="]",
        trigger=TOKEN,
    ),
    special_tokens=True,
)
