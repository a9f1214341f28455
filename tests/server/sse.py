"""The one reader of event streams in tests. It accepts a stream in exactly one terminal form:

- ``[DONE]`` after every choice has had its finish_reason, usage at most once and last; or
- one error object with its four keys, after which nothing comes; or
- for events with types, one of ``TERMINAL_TYPES``.
"""

import json
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

TERMINAL_TYPES = {"response.completed", "response.incomplete", "response.failed"}
TERMINAL_TYPES |= {"message_stop", "error"}
FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter", "function_call"}


@dataclass
class Stream:
    objects: list[dict[str, Any]] = field(default_factory=list)  # the error among them
    done: bool = False  # it ended with [DONE]
    error: dict[str, Any] | None = None
    num_pings: int = 0


def read_stream(body: str | bytes) -> Stream:
    """A whole stream. Raises AssertionError for any other ending than one of the above."""
    text = body if isinstance(body, str) else body.decode()  # UTF-8, never cut
    assert text.endswith("\n\n"), f"cut off: {text[-80:]!r}"
    stream = Stream()
    types: list[str] = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        assert not stream.done and stream.error is None, f"after the end: {block[:80]!r}"
        if block.startswith(":"):
            stream.num_pings += 1
            continue
        kind, line = "", block
        if block.startswith("event: "):
            kind, _, line = block.removeprefix("event: ").partition("\n")
        assert line.startswith("data: ") and "\n" not in line, repr(block[:80])
        _add(stream, kind, line.removeprefix("data: "))
        types.append(kind)
    if any(types):
        assert sum(kind in TERMINAL_TYPES for kind in types) == 1 and types[-1] in TERMINAL_TYPES
    else:
        assert stream.done != (stream.error is not None), "neither [DONE] nor an error"
        _check_chunks(stream)
    return stream


def events(text: str) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a stream, and whether it ended with [DONE]."""
    stream = read_stream(text)
    return stream.objects, stream.done


def _add(stream: Stream, kind: str, data: str) -> None:
    if data == "[DONE]":
        stream.done = True
        return
    item = json.loads(data)
    stream.objects.append(item)
    if not kind and "error" in item:
        assert set(item) == {"error"}
        assert set(item["error"]) == {"message", "type", "param", "code"}
        stream.error = item["error"]


def _check_chunks(stream: Stream) -> None:
    """OpenAI's order: an end for every choice and nothing after it; usage last."""
    seen: set[int] = set()
    ended: set[int] = set()
    chunks = [item for item in stream.objects if "error" not in item]
    for position, chunk in enumerate(chunks):
        if not chunk["choices"]:
            assert chunk["usage"] and position == len(chunks) - 1
        for choice in chunk["choices"]:
            assert choice["index"] not in ended, f"a choice goes on after its end: {choice}"
            seen.add(choice["index"])
            if choice["finish_reason"] is not None:
                assert choice["finish_reason"] in FINISH_REASONS
                ended.add(choice["index"])
    if stream.done:
        assert ended == seen and seen, "[DONE], but not every choice has ended"


@dataclass
class Recorder:
    """What one response sent, seen from below the application."""

    body: bytearray = field(default_factory=bytearray)
    started: bool = False
    ended: bool = False
    left: bool = False  # the client went first

    def check(self) -> None:
        """The stream, if its client stayed, ended in one terminal form; if not, in none."""
        if self.ended:
            read_stream(bytes(self.body))
        elif self.started:
            assert self.left, "the stream just stopped"
            assert b"[DONE]" not in self.body

    def watch(self, receive: Any, send: Any) -> tuple[Any, Any]:
        """ASGI's two callables, watched."""

        async def receive_watched() -> MutableMapping[str, Any]:
            message = await receive()
            self.left |= message["type"] == "http.disconnect" and not self.ended
            return message

        async def send_watched(message: MutableMapping[str, Any]) -> None:
            self.started |= message["type"] == "http.response.start"
            self.body += message.get("body", b"")
            if message["type"] == "http.response.body":
                self.ended |= not message.get("more_body", False)
            await send(message)

        return receive_watched, send_watched
