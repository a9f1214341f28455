"""Llama 3.1 and later, as JSON: the whole answer is a call, or several with semicolons between.

``<|python_tag|>`` may stand before it. Nothing else marks a call, so only declared names count.
"""

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import json_calls
from jaxllm.parsers.reader import Markers, Reader, Steps

TAG = "<|python_tag|>"
_TAG = Markers(TAG)


def _grammar(r: Reader) -> Steps[None]:
    with r.attempt():
        yield from _calls(r)
    while (yield from r.content_until(_TAG)):
        with r.attempt():
            yield from _calls(r)


def _calls(r: Reader) -> Steps[None]:
    yield from r.spaces()
    yield from r.accept(TAG)
    while True:
        yield from r.spaces()
        yield from json_calls(r, known=True)
        yield from r.spaces()
        if not (yield from r.accept(";")):
            return


LLAMA3_JSON = ToolParser(
    _grammar,
    CallForm(begin='{"name": "', before_arguments='", "parameters": ', end="}", separator="; "),
    special_tokens=True,
)
