"""Mistral: ``[TOOL_CALLS]``, then an array of JSON objects; since tokenizer v11 a call each, as
``[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}``, the id left out since v13.
"""

import re

from jaxllm.parsers.family import CallForm, ToolParser, nine_characters
from jaxllm.parsers.json_calls import json_arguments, json_calls
from jaxllm.parsers.reader import Markers, Mismatch, Reader, Steps

OPEN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_OPEN = Markers(OPEN)
_NAME, _ID = re.compile(r"[A-Za-z0-9_.-]+"), re.compile(r"[A-Za-z0-9]+")


def _grammar(r: Reader) -> Steps[None]:
    while (yield from r.content_until(_OPEN)):
        with r.attempt():
            yield from r.expect(OPEN)
            yield from r.spaces()
            if (yield from r.peek()) in ("[", "{"):
                yield from json_calls(r)
            else:
                yield from _call(r)


def _call(r: Reader) -> Steps[None]:
    name = yield from r.word(_NAME)
    id = (yield from r.word(_ID)) if (yield from r.accept(ID)) else None
    yield from r.accept(ARGUMENTS)
    yield from r.spaces()
    if not (yield from r.sees("{")):
        raise Mismatch
    r.start_call(name, id)
    yield from json_arguments(r, r.arguments)
    r.end_call()


MISTRAL = ToolParser(
    _grammar,
    CallForm(
        opening="[TOOL_CALLS] [",
        begin='{"name": "',
        before_arguments='", "arguments": ',
        end="}",
        separator=", ",
        closing="]",
        trigger=OPEN,
    ),
    special_tokens=True,
    new_id=nine_characters,
)
MISTRAL_V11 = ToolParser(
    _grammar,
    CallForm(begin="[TOOL_CALLS]", before_arguments="[ARGS]", end="", trigger=OPEN),
    special_tokens=True,
    new_id=nine_characters,
)
