"""Hermes 2 and 3, Qwen 2.5 and 3, and many others: one JSON object per pair of tags."""

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import json_call
from jaxllm.parsers.reader import Markers, Reader, Steps

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OPEN = Markers(OPEN)


def _grammar(r: Reader) -> Steps[None]:
    while (yield from r.content_until(_OPEN)):
        with r.attempt():
            yield from r.expect(OPEN)
            yield from r.spaces()
            yield from json_call(r)
        yield from r.closing(CLOSE)


HERMES = ToolParser(
    _grammar,
    CallForm(
        begin='<tool_call>\n{"name": "',
        before_arguments='", "arguments": ',
        end="}\n</tool_call>",
        separator="\n",
        trigger=OPEN,
    ),
)
