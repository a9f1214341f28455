"""Tools in words, for models whose chat template has none for them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.parsers.family import CallForm


def described(form: CallForm, tools: Sequence[Mapping[str, Any]]) -> str:
    """A part of the system's message. ``tools`` are in OpenAI's form."""
    lines = "\n".join(json.dumps(tool.get("function"), ensure_ascii=False) for tool in tools)
    call = f"{form.begin}NAME{form.before_arguments}{_arguments(form)}{form.end}"
    return (
        f"These tools can be called, each with arguments as its parameters say:\n{lines}\n\n"
        f"A call of a tool is written like this:\n{form.opening}{call}{form.closing}"
    )


def _arguments(form: CallForm) -> str:
    if form.arguments == "python":
        return 'ARGUMENT="VALUE"'
    if form.arguments == "tagged":
        return form.tag.format(name="ARGUMENT", value="VALUE")
    return '{"ARGUMENT": "VALUE"}'
