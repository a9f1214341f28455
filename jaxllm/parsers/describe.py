"""Tools and their calls in words, for models whose chat template has none for them."""

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


def written(form: CallForm, calls: Sequence[tuple[str, Any]]) -> str:
    """Calls as a model of that family writes them; each a name and its arguments, which are an
    object, or text where they are not even JSON.
    """
    return (
        form.opening
        + form.separator.join(
            f"{form.begin}{name}{form.before_arguments}{_given(form, arguments)}{form.end}"
            for name, arguments in calls
        )
        + form.closing
    )


def in_words(messages: Sequence[Mapping[str, Any]], form: CallForm) -> list[dict[str, Any]]:
    """A conversation without calls of tools and without results: they are text of the assistant and
    of the user. Messages that then are of one role in a row are one, since templates may insist on
    turns.
    """
    told: list[dict[str, Any]] = []
    for message in messages:
        role, text = message["role"], message["content"]
        plain = {**message, "content": text}
        if calls := plain.pop("tool_calls", None):
            functions = [call.get("function") for call in calls]
            named = [
                (str(function.get("name", "")), function.get("arguments") or {})
                for function in functions
                if isinstance(function, Mapping)  # clients send what they like
            ]
            plain["content"] = "\n".join(filter(None, (_text(text), written(form, named))))
        elif role in ("tool", "function"):
            plain = {"role": "user", "content": f"The tool answered: {_text(text)}"}
        if told and told[-1]["role"] == plain["role"] != "system" and role != "assistant":
            joined = f"{_text(told[-1]['content'])}\n\n{_text(plain['content'])}"
            told[-1] = told[-1] | {"content": joined}
        else:
            told.append(plain)
    return told


def _text(content: Any) -> str:
    if not isinstance(content, list):
        return content or ""
    return "\n".join(str(part.get("text", "")) for part in content)


def _given(form: CallForm, arguments: Any) -> str:
    if not isinstance(arguments, Mapping):
        return str(arguments)
    if form.arguments == "json":
        return json.dumps(arguments, ensure_ascii=False)
    if form.arguments == "python":
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in arguments.items()
    }
    return "".join(form.tag.format(name=name, value=value) for name, value in texts.items())


def _arguments(form: CallForm) -> str:
    if form.arguments == "python":
        return 'ARGUMENT="VALUE"'
    if form.arguments == "tagged":
        return form.tag.format(name="ARGUMENT", value="VALUE")
    return '{"ARGUMENT": "VALUE"}'
