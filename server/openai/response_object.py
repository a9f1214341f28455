"""A response while it is made: the object, and the events that tell its story. Knows no HTTP."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from jaxllm.errors import JaxLLMError
from jaxllm.outputs import CompletionOutput
from jaxllm.parsers.events import Content, Reasoning, ToolArguments, ToolCallStart
from jaxllm.parsers.events import Event as Said
from jaxllm.sampling_params import SamplingParams
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.openai.logprobs import chat_logprobs
from server.openai.reply import Usage, finish_reason
from server.openai.response_items import Event, ResponseItems
from server.openai.response_request import ResponsesRequest
from server.openai.stream import Outputs
from server.openai.taps import taps_object
from server.thought_tokens import ThoughtTokens
from server.turns import Turns


class ResponseDraft:
    """``id`` also names the request in the engine. Events are numbered in the order in which they
    are made.
    """

    def __init__(
        self, body: ResponsesRequest, params: SamplingParams, tokenizer: Tokenizer, turns: Turns
    ):
        self.id = f"resp_{uuid4().hex}"
        self._created_at = int(time.time())
        self._body = body
        self._params = params
        self._tokenizer = tokenizer
        self._turns = turns
        self._usage = Usage(ThoughtTokens(turns, tokenizer))
        self._items = ResponseItems(self._event)
        self._scores: list[dict[str, Any]] = []  # of tokens whose text is still to come
        self._num_events = 0
        self._taps: dict[str, Any] = {}  # of an answer that is not streamed
        self._status = "in_progress"

    async def answer(self, outputs: Outputs) -> dict[str, Any]:
        """The whole object. Raises JaxLLMError, also when the output never ended."""
        async for _ in self.events(outputs):
            continue
        return self._response() | self._taps

    async def events(self, outputs: Outputs) -> AsyncGenerator[list[Event]]:
        """The events that each output brings, together. Raises as ``answer``."""
        async with aclosing(outputs):
            async for _, output in outputs:
                self._usage.add(0, output)
                events = [] if self._num_events else self._created()
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
        return [*events, self._event("response.failed", response=self._response(error=said))]

    def _created(self) -> list[Event]:
        names = ("response.created", "response.in_progress")
        return [self._event(name, response=self._response()) for name in names]

    def _advance(self, completion: CompletionOutput) -> list[Event]:
        if completion.taps is not None:
            self._taps = {"taps": taps_object(completion.taps)}
        if completion.logprobs is not None:
            top = self._body.top_logprobs or 0
            ids, positions = completion.token_ids, completion.logprobs
            self._scores += chat_logprobs(ids, positions, top, self._tokenizer)["content"]
        events: list[Event] = []
        for said in self._turns.read(0, completion):
            events += self._say(said)
        reason = finish_reason(completion)
        if reason is None:
            return events
        if (self._scores and self._items.in_message) or not self._items.objects("completed"):
            events += self._items.text("", self._scores)
        self._status = "incomplete" if reason == "length" else "completed"
        events += self._items.close(self._status)
        return [*events, self._event(f"response.{self._status}", response=self._response())]

    def _say(self, said: Said) -> list[Event]:
        """Scores are told of text only, since nothing else has a place for them."""
        scores, self._scores = self._scores, []
        match said:
            case Content(text):
                return self._items.text(text, scores)
            case Reasoning(text):
                return self._items.thoughts(text)
            case ToolCallStart(_, name, id):
                return self._items.call(name, id)
            case ToolArguments(_, text):
                return self._items.arguments(text)
        return []

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _response(self, error: dict[str, Any] | None = None) -> dict[str, Any]:
        body, incomplete = self._body, self._status == "incomplete"
        output = self._items.objects("incomplete" if error else self._status)
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
            "temperature": self._params.temperature,
            "text": {"format": body.text_format()},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.as_object() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self._params.top_p,
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
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }
