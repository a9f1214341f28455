"""A response while it is made: the object, and the events that tell its story. Knows no HTTP."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from jaxllm.errors import JaxLLMError
from jaxllm.outputs import CompletionOutput
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.openai.logprobs import chat_logprobs
from server.openai.reply import Usage, finish_reason
from server.openai.response_request import ResponsesRequest
from server.openai.stream import Outputs

Event = dict[str, Any]


class ResponseDraft:
    """Holds one message with one text, since there are no tools. ``id`` also names the request in
    the engine. Events are numbered in the order in which they are made.
    """

    def __init__(self, body: ResponsesRequest, tokenizer: Tokenizer):
        self.id = f"resp_{uuid4().hex}"
        self._item_id = f"msg_{uuid4().hex}"
        self._created_at = int(time.time())
        self._body = body
        self._tokenizer = tokenizer
        self._usage = Usage()
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._num_events = 0
        self._status = "in_progress"

    async def answer(self, outputs: Outputs) -> dict[str, Any]:
        """The whole object. Raises JaxLLMError, also when the output never ended."""
        async for _ in self.events(outputs):
            continue
        return self._response([self._item()])

    async def events(self, outputs: Outputs) -> AsyncGenerator[list[Event]]:
        """The events that each output brings, together. Raises as ``answer``."""
        async with aclosing(outputs):
            async for _, output in outputs:
                self._usage.add(0, output)
                events = [] if self._num_events else [*self._created(), *self._opening()]
                for completion in output.outputs:
                    events += self._advance(completion)
                if events:
                    yield events
        if self._status == "in_progress":
            raise JaxLLMError("The engine's output ended before the request did.")

    def failed(self, error: dict[str, Any]) -> list[Event]:
        """The end of a stream that cannot go on; ``error`` is OpenAI's error object."""
        events = [] if self._num_events else self._created()
        self._status = "failed"
        code = "invalid_prompt" if error["type"] == "invalid_request_error" else "server_error"
        said = {"code": code, "message": error["message"]}
        response = self._response([self._item()] if self._pieces else [], error=said)
        return [*events, self._event("response.failed", response=response)]

    def _created(self) -> list[Event]:
        names = ("response.created", "response.in_progress")
        return [self._event(name, response=self._response([])) for name in names]

    def _opening(self) -> list[Event]:
        item = {**self._item(), "content": []}
        part = {**self._part(), "logprobs": []}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._text_event("response.content_part.added", part=part),
        ]

    def _advance(self, completion: CompletionOutput) -> list[Event]:
        scored: list[dict[str, Any]] = []
        if completion.logprobs is not None:
            top = self._body.top_logprobs or 0
            ids, positions = completion.token_ids, completion.logprobs
            scored = chat_logprobs(ids, positions, top, self._tokenizer)["content"]
        self._pieces.append(completion.text)
        self._logprobs += scored
        events: list[Event] = []
        if completion.text or scored:
            delta = {"delta": completion.text, "logprobs": scored}
            events.append(self._text_event("response.output_text.delta", **delta))
        reason = finish_reason(completion)
        if reason is None:
            return events
        self._status = "incomplete" if reason == "length" else "completed"
        text, item = self._part(), self._item()
        done = {"text": text["text"], "logprobs": self._logprobs}
        return [
            *events,
            self._text_event("response.output_text.done", **done),
            self._text_event("response.content_part.done", part=text),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{self._status}", response=self._response([item])),
        ]

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _text_event(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _part(self) -> dict[str, Any]:
        text = "".join(self._pieces)
        part = {"type": "output_text", "text": text, "annotations": []}
        return part | {"logprobs": self._logprobs}

    def _item(self) -> dict[str, Any]:
        status = "incomplete" if self._status == "failed" else self._status
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _response(
        self, output: list[dict[str, Any]], error: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        body, incomplete = self._body, self._status == "incomplete"
        params = body.sampling_params()
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "status": self._status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.template_options().reasoning_effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {"format": body.text_format()},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if self._status == "in_progress" else self._usage_object(),
            "user": body.user,
        }

    def _usage_object(self) -> dict[str, Any]:
        usage = self._usage.as_object()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
