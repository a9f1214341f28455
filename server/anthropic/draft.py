"""A message while it is made: the object, and the events that tell its story. Knows no HTTP."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from jaxllm.errors import InvalidRequestError, JaxLLMError
from jaxllm.outputs import CompletionOutput
from jaxllm.parsers.events import Content, Reasoning, ToolArguments, ToolCallStart
from jaxllm.parsers.events import Event as Said
from server.openai.json_text import parse_json
from server.openai.reply import Usage, finish_reason
from server.openai.stream import Outputs
from server.openai.taps import taps_object
from server.turns import Turns

Event = dict[str, Any]
_PIECE = {"text": "text_delta", "thinking": "thinking_delta"}


class MessageDraft:
    """``id`` also names the request in the engine."""

    def __init__(self, model: str, turns: Turns):
        self.id = f"msg_{uuid4().hex}"
        self._model, self._turns = model, turns
        self._usage = Usage()
        self._blocks: list[dict[str, Any]] = []
        self._open = False  # the last block
        self._pieces: list[str] = []  # of its text, or of the arguments of its call
        self._started = False
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None
        self._taps: dict[str, Any] = {}  # of an answer that is not streamed

    async def answer(self, outputs: Outputs) -> dict[str, Any]:
        """The whole object. Raises JaxLLMError, also when the output never ended."""
        async for _ in self.events(outputs):
            continue
        return self._message(self._blocks) | self._taps

    async def events(self, outputs: Outputs) -> AsyncGenerator[list[Event]]:
        """The events that each output brings, together. Raises as ``answer``."""
        async with aclosing(outputs):
            async for _, output in outputs:
                self._usage.add(0, output)
                events: list[Event] = []
                if not self._started:
                    self._started = True
                    events.append({"type": "message_start", "message": self._message([])})
                for completion in output.outputs:
                    events += self._advance(completion)
                if events:
                    yield events
        if self._stop_reason is None:
            raise JaxLLMError("The engine's output ended before the request did.")

    def _advance(self, completion: CompletionOutput) -> list[Event]:
        if completion.taps is not None:
            self._taps = {"taps": taps_object(completion.taps)}
        events: list[Event] = []
        for said in self._turns.read(0, completion):
            events += self._say(said)
        reason = finish_reason(completion)
        if reason is None:
            return events
        self._end(reason, completion.stop_reason)
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        return [
            *events,
            *self._close(),
            {"type": "message_delta", "delta": delta, "usage": self._usage_object()},
            {"type": "message_stop"},
        ]

    def _end(self, reason: str, stop: int | str | None) -> None:
        if reason == "length":
            self._stop_reason = "max_tokens"
        elif isinstance(stop, str):
            self._stop_reason, self._stop_sequence = "stop_sequence", stop
        else:
            self._stop_reason = "tool_use" if self._turns.called(0) else "end_turn"

    def _say(self, said: Said) -> list[Event]:
        match said:
            case Content(text):
                return self._add("text", text)
            case Reasoning(text):
                return self._add("thinking", text)
            case ToolCallStart(_, name, id):
                return self._start({"type": "tool_use", "id": id, "name": name, "input": {}})
            case ToolArguments(_, text):
                self._pieces.append(text)
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
        return self._close()

    def _add(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._open or self._blocks[-1]["type"] != kind:
            signature = {"signature": ""} if kind == "thinking" else {}
            events = self._start({"type": kind, kind: ""} | signature)
        self._pieces.append(text)
        return [*events, self._delta({"type": _PIECE[kind], kind: text})]

    def _start(self, block: dict[str, Any]) -> list[Event]:
        events = self._close()
        self._blocks.append(block)
        self._open, self._pieces = True, []
        start = {"type": "content_block_start", "index": len(self._blocks) - 1}
        return [*events, start | {"content_block": dict(block)}]

    def _delta(self, delta: dict[str, str]) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[Event]:
        if not self._open:
            return []
        self._open = False
        block, said = self._blocks[-1], "".join(self._pieces)
        if block["type"] == "tool_use":
            block["input"] = _input_of(said)
        else:
            block[block["type"]] = said
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _message(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage_object(),
        }

    def _usage_object(self) -> dict[str, int]:
        usage = self._usage.as_object()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "output_tokens": usage["completion_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }


def _input_of(arguments: str) -> dict[str, Any]:
    """An object; text that is none, of a call that broke off, is kept as text."""
    try:
        value = parse_json(arguments.encode())
    except InvalidRequestError:
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}
