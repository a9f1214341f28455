"""POST /v1/messages and /v1/messages/count_tokens."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.anthropic.conversation import template_messages, template_options
from server.anthropic.draft import MessageDraft
from server.anthropic.errors import anthropic_error
from server.anthropic.schemas import CountTokensRequest, MessagesRequest
from server.disconnect import unless_disconnected
from server.limits import num_prompt_tokens
from server.openai.conversation import LONG_CHARS, render
from server.openai.stream import about
from server.openai.validation import read_request
from server.record import record_of
from server.responses import JSONResponse
from server.serving import aside, serving_of
from server.sse import EventStream, named_event
from server.turns import Turns


async def messages(request: Request) -> Response:
    body = await read_request(request, MessagesRequest)
    serving = serving_of(request)
    options = template_options(body)
    prompt = await render(template_messages(body), options, serving)
    choice = body.tool_choice
    one_call = choice is not None and choice.disable_parallel_tool_use
    turns = Turns(
        serving.parsers,
        prompt,
        options.chosen_tools(),
        parallel=body.parallel_tool_calls is not False and not one_call,
        thoughts=body.thinking is None or body.thinking.type != "disabled",
    )
    thinks = serving.parsers.reasoning is not None
    params = turns.params(body.sampling_params(serving.sampling_defaults, thinks=thinks))
    draft = MessageDraft(body.model, turns)
    outputs = about(
        serving.generate(
            [prompt],
            params,
            request_id=draft.id,
            record=record_of(request),
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            add_special_tokens=False,  # the template has written them
        ),
        prompt="messages",
        stop="stop_sequences",
    )
    if body.stream:
        return MessageStream(
            draft.events(outputs),
            ping_interval_s=serving.settings.ping_interval_s,
        )
    return JSONResponse(await unless_disconnected(request.receive, draft.answer(outputs)))


async def count_tokens(request: Request) -> Response:
    body = await read_request(request, CountTokensRequest)
    serving = serving_of(request)
    prompt = await render(template_messages(body), template_options(body), serving)
    tokenizer = serving.client.tokenizer
    with serving.gate.admit(1, num_prompt_tokens([prompt])):
        ids = await aside(len(prompt) > LONG_CHARS, tokenizer.encode, prompt, False)
    return JSONResponse({"input_tokens": len(ids)})


class MessageStream(EventStream):
    """Its events have names, and ``message_stop`` is the last."""

    end = b""

    def encode(self, event: Any) -> bytes:
        return named_event(event)

    def failure(self, body: dict[str, Any]) -> bytes:
        error = body["error"]
        status = 400 if error["type"] == "invalid_request_error" else 500
        return named_event(anthropic_error(error, status, self._request_id))
