"""The items of a response's output while they grow, and the events that tell of it.

One item is open at a time: thoughts, a message, a call.
"""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

Event = dict[str, Any]
Tell = Callable[..., Event]  # (kind, **fields)

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponseItems:
    """``tell`` makes an event. An item's text is kept in pieces until it is asked for."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self._items: list[dict[str, Any]] = []  # those that are closed, and the open one
        self._pieces: list[str] = []  # of the open one
        self._scores: list[dict[str, Any]] = []
        self._open = False

    @property
    def in_message(self) -> bool:
        return self._open and self._items[-1]["type"] == "message"

    def text(self, text: str, scores: list[dict[str, Any]]) -> list[Event]:
        events = self._opened("message", "msg", role="assistant")
        self._pieces.append(text)
        self._scores += scores
        return [*events, self._part_event("delta", delta=text, logprobs=scores)]

    def thoughts(self, text: str) -> list[Event]:
        events = self._opened("reasoning", "rs", summary=[])
        self._pieces.append(text)
        return [*events, self._part_event("delta", delta=text)]

    def call(self, name: str, call_id: str | None) -> list[Event]:
        events = self.close("completed")
        fields = {"call_id": call_id, "name": name, "arguments": ""}
        return [*events, *self._opened("function_call", "fc", **fields)]

    def arguments(self, text: str) -> list[Event]:
        self._pieces.append(text)
        return [self._event("function_call_arguments.delta", delta=text)]

    def close(self, status: str) -> list[Event]:
        """The open item is whole, or "incomplete"."""
        if not self._open:
            return []
        item = self._items[-1] = self._current(status)
        if item["type"] == "function_call":
            fields = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("function_call_arguments.done", **fields)]
        else:
            (part,) = item["content"]
            scores = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            events = [
                self._part_event("done", text=part["text"], **scores),
                self._event("content_part.done", content_index=0, part=part),
            ]
        self._open = False
        done = {"output_index": len(self._items) - 1, "item": item}
        return [*events, self._tell("response.output_item.done", **done)]

    def objects(self, status: str) -> list[dict[str, Any]]:
        """All items; the open one has this ``status``."""
        return [*self._items[:-1], self._current(status)] if self._open else list(self._items)

    def _opened(self, kind: str, prefix: str, **fields: Any) -> list[Event]:
        if self._open and self._items[-1]["type"] == kind:
            return []
        events = self.close("completed")
        self._items.append({"id": f"{prefix}_{uuid4().hex}", "type": kind} | fields)
        self._open, self._pieces, self._scores = True, [], []
        item = self._current("in_progress")
        if kind in _PARTS:
            item["content"] = []
        added = {"output_index": len(self._items) - 1, "item": item}
        events.append(self._tell("response.output_item.added", **added))
        if kind in _PARTS:
            part = self._part(kind)
            events.append(self._event("content_part.added", content_index=0, part=part))
        return events

    def _current(self, status: str) -> dict[str, Any]:
        item = self._items[-1] | {"status": status}
        if item["type"] in _PARTS:
            return item | {"content": [self._part(item["type"])]}
        return item | {"arguments": "".join(self._pieces)}

    def _part(self, kind: str) -> dict[str, Any]:
        part: dict[str, Any] = {"type": _PARTS[kind], "text": "".join(self._pieces)}
        if kind == "message":
            part |= {"annotations": [], "logprobs": list(self._scores)}
        return part

    def _part_event(self, moment: str, **fields: Any) -> Event:
        name = _PARTS[self._items[-1]["type"]]
        return self._event(f"{name}.{moment}", content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return self._tell(f"response.{kind}", **place, **fields)
