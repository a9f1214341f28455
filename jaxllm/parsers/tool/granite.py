"""Granite 3: a marker, then an array of JSON objects. Granite 4: as Hermes."""

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import calls_between

TOKEN, TAG, CLOSE = "<|tool_call|>", "<tool_call>", "</tool_call>"

GRANITE = ToolParser(
    calls_between(TOKEN, TAG, closing=CLOSE),
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
