"""What a model said besides text, in the forms of chat completions: whole and as deltas."""

from collections.abc import Iterable
from typing import Any

from jaxllm.parsers.events import Content, Event, Reasoning, ToolArguments, ToolCallStart


def message_of(events: Iterable[Event]) -> dict[str, Any]:
    """The assistant's message. Content is null where there are only calls."""
    content: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                thoughts.append(text)
            case ToolCallStart(_, name, id):
                function = {"name": name, "arguments": ""}
                calls.append({"id": id, "type": "function", "function": function})
            case ToolArguments(_, text):
                calls[-1]["function"]["arguments"] += text
    text = "".join(content)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
    return message | _thoughts("".join(thoughts))


def delta_of(event: Event) -> dict[str, Any] | None:
    """A call's first delta has its id and name; those that follow bring its arguments."""
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return _thoughts(text)
        case ToolCallStart(index, name, id):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case ToolArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return None


def _thoughts(text: str) -> dict[str, str]:
    """Clients read the one name or the other."""
    return {"reasoning": text, "reasoning_content": text} if text else {}
