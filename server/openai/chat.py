"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.disconnect import unless_disconnected
from server.openai.conversation import render
from server.openai.logprobs import chat_logprobs, prompt_logprobs
from server.openai.reply import Reply, best, finish_reason
from server.openai.said import delta_of, message_of
from server.openai.schemas import ChatCompletionRequest
from server.openai.stream import Choice, Outputs, about, stream_chunks
from server.openai.taps import taps_object
from server.openai.validation import read_request
from server.record import record_of
from server.responses import JSONResponse
from server.serving import serving_of
from server.sse import EventStream
from server.thought_tokens import ThoughtTokens
from server.turns import Turns


async def chat_completions(request: Request) -> Response:
    body = await read_request(request, ChatCompletionRequest)
    serving = serving_of(request)
    messages = [message.as_template_message() for message in body.messages]
    prompt = await render(messages, body, serving)
    turns = Turns(
        serving.parsers,
        prompt,
        body.chosen_tools(),
        parallel=body.parallel_tool_calls is not False,
        thoughts=body.include_reasoning is not False,
    )
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    thoughts = ThoughtTokens(turns, serving.client.tokenizer)
    reply = Reply("chatcmpl", kind, body.model, thoughts)
    params = turns.params(body.sampling_params(serving.sampling_defaults))
    outputs = about(
        serving.generate(
            [prompt],
            params,
            beams=body.beam_search_params(params),
            request_id=reply.id,
            record=record_of(request),
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            # The template has written them.
            add_special_tokens=body.add_special_tokens is True,
        ),
        prompt="messages",
        max_tokens="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )
    if body.stream:
        return EventStream(
            _chunks(outputs, reply, body, turns, serving.client.tokenizer),
            ping_interval_s=serving.settings.ping_interval_s,
        )
    answer = _answer(outputs, reply, body, turns, serving.client.tokenizer)
    return JSONResponse(await unless_disconnected(request.receive, answer))


async def _answer(
    outputs: Outputs,
    reply: Reply,
    body: ChatCompletionRequest,
    turns: Turns,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    choices: list[Choice] = []
    scored_prompt = None
    async with aclosing(outputs):
        async for index, output in outputs:
            reply.usage.add(index, output)
            scored_prompt = prompt_logprobs(output.prompt_logprobs)
            for completion in best(output.outputs, body.num_choices):
                message = message_of(turns.read(completion.index, completion))
                taps = completion.taps
                choices.append(
                    {
                        "index": completion.index,
                        "message": message,
                        "logprobs": _logprobs(completion, body, tokenizer),
                        "finish_reason": _reason(completion, turns, completion.index),
                        "stop_reason": completion.stop_reason,
                    }
                    | ({} if taps is None else {"taps": taps_object(taps)})
                )
    answer = reply.with_choices(choices, usage=reply.usage.as_object(), system_fingerprint=None)
    return answer if scored_prompt is None else answer | {"prompt_logprobs": scored_prompt}


def _chunks(
    outputs: Outputs,
    reply: Reply,
    body: ChatCompletionRequest,
    turns: Turns,
    tokenizer: Tokenizer,
) -> AsyncGenerator[list[dict[str, Any]]]:
    def opening(base: int, output: RequestOutput) -> list[Choice]:
        return [
            _choice(base + index, {"role": "assistant", "content": ""})
            for index in range(body.num_choices)
        ]

    def deltas(index: int, completion: CompletionOutput) -> list[Choice]:
        logprobs = _logprobs(completion, body, tokenizer)
        found = [delta_of(event) for event in turns.read(index, completion)]
        told = [delta for delta in found if delta is not None]
        if not told and logprobs and completion.token_ids:
            told = [{"content": ""}]
        choices = [_choice(index, delta) for delta in told]
        if choices:  # tokens and events do not fall together, so all scores go to the first
            choices[0]["logprobs"] = logprobs
        return choices

    def ending(index: int, completion: CompletionOutput, reason: str) -> Choice:
        reason = _reason(completion, turns, index) or reason
        return _choice(index, {}, reason) | {"stop_reason": completion.stop_reason}

    return stream_chunks(
        outputs,
        reply,
        num_choices=body.num_choices,
        options=body.stream_options,
        opening=opening,
        deltas=deltas,
        ending=ending,
    )


def _choice(index: int, delta: dict[str, Any], reason: str | None = None) -> Choice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _reason(completion: CompletionOutput, turns: Turns, index: int) -> str | None:
    reason = finish_reason(completion)
    if reason == "stop" and turns.called(index) and not turns.named:  # as OpenAI has it
        return "tool_calls"
    return reason


def _logprobs(
    completion: CompletionOutput, body: ChatCompletionRequest, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    if not body.logprobs or completion.logprobs is None:
        return None
    num_top = body.top_logprobs or 0
    return chat_logprobs(completion.token_ids, completion.logprobs, num_top, tokenizer)
