"""Hermes 2 and 3, Qwen 2.5 and 3, and many others: one JSON object per pair of tags."""

from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import calls_between, json_call

OPEN, CLOSE = "<tool_call>", "</tool_call>"

HERMES = ToolParser(
    calls_between(OPEN, closing=CLOSE, body=json_call),
    CallForm(
        begin='<tool_call>\n{"name": "',
        before_arguments='", "arguments": ',
        end="}\n</tool_call>",
        separator="\n",
        trigger=OPEN,
    ),
)
