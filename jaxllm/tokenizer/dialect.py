"""What some templates want otherwise than clients of OpenAI's API say it."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

_FIRST_CALL = "tool_calls[0]"
_NO_CONTENT = "== 'assistant' and message['content'] is none"

type Message = dict[str, Any]


def in_dialect(messages: Sequence[Message], template: str) -> list[Message]:
    """The conversation as ``template`` reads it.

    One that takes a message's first call only (gpt-oss, Llama 3) gets a message per call, with its
    result behind it. DeepSeek-R1's tells calls only where the content is none. Thoughts stand under
    all the names that templates have for them.
    """
    told = _one_call_each(messages) if _FIRST_CALL in template else messages
    none_beside_calls = _NO_CONTENT in template
    return [_told(message, none_beside_calls) for message in told]


def _told(message: Message, none_beside_calls: bool) -> Message:
    calls, content = message.get("tool_calls"), message.get("content")
    if thoughts := message.get("reasoning_content"):
        # gpt-oss refuses a call with both, and takes either for the thoughts.
        names = ("reasoning",) if calls and content else ("reasoning", "thinking")
        message = dict.fromkeys(names, thoughts) | message
    if calls and not content and none_beside_calls:
        return message | {"content": None}
    return message


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            yield message
            continue
        results: dict[str, list[Message]] = {}
        while rest and rest[0]["role"] == "tool":
            result = rest.popleft()
            results.setdefault(str(result.get("tool_call_id")), []).append(result)
        for call in calls:
            yield message | {"tool_calls": [call]}
            yield from results.pop(str(call.get("id")), ())
            message = {"role": message["role"], "content": ""}
        yield from chain.from_iterable(results.values())
