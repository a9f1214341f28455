"""Apriel Thinker: an array of JSON objects between tags."""

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import calls_between

OPEN, CLOSE = "<tool_calls>", "</tool_calls>"

APRIEL = ToolParser(
    calls_between(OPEN, closing=CLOSE),
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
