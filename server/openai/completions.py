"""POST /v1/completions."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.disconnect import unless_disconnected
from server.openai.logprobs import CompletionLogprobs, prompt_logprobs
from server.openai.reply import Reply, best, finish_reason
from server.openai.schemas import CompletionRequest
from server.openai.stream import Choice, Outputs, stream_chunks
from server.openai.taps import taps_object
from server.openai.validation import read_request
from server.record import record_of
from server.responses import JSONResponse
from server.serving import serving_of
from server.sse import EventStream


async def completions(request: Request) -> Response:
    body = await read_request(request, CompletionRequest)
    serving = serving_of(request)
    reply = Reply("cmpl", "text_completion", body.model)
    params = body.sampling_params(serving.sampling_defaults)
    outputs = serving.generate(
        body.prompts,
        params,
        beams=body.beam_search_params(params),
        request_id=reply.id,
        record=record_of(request),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        add_special_tokens=body.add_special_tokens is not False,
    )
    choices = _Choices(body, serving.client.tokenizer)
    if body.stream:
        return EventStream(
            _chunks(outputs, reply, body, choices),
            ping_interval_s=serving.settings.ping_interval_s,
        )
    answer = _answer(outputs, reply, body, choices)
    return JSONResponse(await unless_disconnected(request.receive, answer))


class _Choices:
    """Builds ``choices[]``, whole or in parts; remembers how far each one's text has come."""

    def __init__(self, body: CompletionRequest, tokenizer: Tokenizer):
        self._body = body
        self._tokenizer = tokenizer
        self._skips_special = body.skip_special_tokens is not False
        self._scored: dict[int, CompletionLogprobs] = {}

    def echo(self, index: int, output: RequestOutput) -> Choice:
        """The prompt, as the beginning of a choice's text."""
        text = output.prompt
        if text is None:
            ids = output.prompt_token_ids
            text = self._tokenizer.decode(ids, skip_special_tokens=self._skips_special)
        positions = output.prompt_logprobs
        ids, given = output.prompt_token_ids, output.prompt or ""
        return self.part(index, text, ids, positions, echoed=given)

    def part(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        positions: Sequence[PositionLogprobs | None] | None,
        reason: str | None = None,
        echoed: str = "",
    ) -> Choice:
        logprobs = None
        if self._body.logprobs is not None and positions is not None:
            logprobs = self._scored_choice(index).part(token_ids, positions, echoed)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, index: int, output: RequestOutput, completion: CompletionOutput) -> Choice:
        echo = self.echo(index, output) if self._body.echo else None
        choice = self.part(
            index,
            completion.text,
            completion.token_ids,
            completion.logprobs,
            finish_reason(completion),
        )
        if echo is not None:
            choice["text"] = echo["text"] + choice["text"]
            if echo["logprobs"] is not None and choice["logprobs"] is not None:
                choice["logprobs"] = {
                    key: echo["logprobs"][key] + values
                    for key, values in choice["logprobs"].items()
                }
        choice["stop_reason"] = completion.stop_reason
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if completion.taps is not None:
            choice["taps"] = taps_object(completion.taps)
        return choice

    def _scored_choice(self, index: int) -> CompletionLogprobs:
        if index not in self._scored:
            skipped = self._tokenizer.special_ids if self._skips_special else ()
            self._scored[index] = CompletionLogprobs(self._tokenizer, skipped)
        return self._scored[index]


async def _answer(
    outputs: Outputs, reply: Reply, body: CompletionRequest, choices: _Choices
) -> dict[str, Any]:
    done: list[Choice] = []
    async with aclosing(outputs):
        async for prompt_index, output in outputs:
            reply.usage.add(prompt_index, output)
            base = prompt_index * body.num_choices
            some = best(output.outputs, body.num_choices)
            done += [choices.whole(base + c.index, output, c) for c in some]
    done.sort(key=lambda choice: choice["index"])
    return reply.with_choices(done, usage=reply.usage.as_object(), system_fingerprint=None)


def _chunks(
    outputs: Outputs, reply: Reply, body: CompletionRequest, choices: _Choices
) -> AsyncGenerator[list[dict[str, Any]]]:
    def opening(base: int, output: RequestOutput) -> list[Choice]:
        if not body.echo:
            return []
        return [choices.echo(base + index, output) for index in range(body.num_choices)]

    def deltas(index: int, completion: CompletionOutput) -> list[Choice]:
        scored = body.logprobs is not None and completion.token_ids
        if not completion.text and not scored:
            return []
        return [choices.part(index, completion.text, completion.token_ids, completion.logprobs)]

    def ending(index: int, completion: CompletionOutput, reason: str) -> Choice:
        end = choices.part(index, "", (), None, reason)
        return end | {"stop_reason": completion.stop_reason}

    return stream_chunks(
        outputs,
        reply,
        num_choices=body.num_choices,
        options=body.stream_options,
        opening=opening,
        deltas=deltas,
        ending=ending,
    )
