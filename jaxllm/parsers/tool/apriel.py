"""Apriel Thinker: an array of JSON objects between tags."""

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import json_calls
from jaxllm.parsers.reader import Markers, Reader, Steps

OPEN, CLOSE = "<tool_calls>", "</tool_calls>"
_OPEN = Markers(OPEN)


def _grammar(r: Reader) -> Steps[None]:
    while (yield from r.content_until(_OPEN)):
        with r.attempt():
            yield from r.expect(OPEN)
            yield from r.spaces()
            yield from json_calls(r)
        yield from r.closing(CLOSE)


APRIEL = ToolParser(
    _grammar,
    CallForm(
        opening=f"{OPEN}[",
        begin='{"name": "',
        before_arguments='", "arguments": ',
        end="}",
        separator=", ",
        closing=f"]{CLOSE}",
        trigger=OPEN,
    ),
    special_tokens=True,  # since 1.6
)
