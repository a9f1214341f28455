"""POST /v1/responses. Nothing is stored: each request brings its whole conversation."""

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.disconnect import unless_disconnected
from server.openai.conversation import render
from server.openai.response_object import Event, ResponseDraft
from server.openai.response_request import ResponsesRequest
from server.openai.stream import about
from server.openai.validation import read_request
from server.record import record_of
from server.responses import JSONResponse
from server.serving import serving_of
from server.sse import EventStream, named_event
from server.turns import Turns


async def responses(request: Request) -> Response:
    body = await read_request(request, ResponsesRequest)
    serving = serving_of(request)
    options = body.template_options()
    prompt = await render(body.messages(), options, serving, param="input")
    parallel = body.parallel_tool_calls is not False
    turns = Turns(serving.parsers, prompt, options.chosen_tools(), parallel=parallel)
    params = turns.params(body.sampling_params(serving.sampling_defaults))
    draft = ResponseDraft(body, params, serving.client.tokenizer, turns)
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
        prompt="input",
        max_tokens="max_output_tokens",
    )
    if body.stream:
        return ResponseStream(
            draft,
            draft.events(outputs),
            ping_interval_s=serving.settings.ping_interval_s,
        )
    return JSONResponse(await unless_disconnected(request.receive, draft.answer(outputs)))


class ResponseStream(EventStream):
    """Its events have names, and its last one says how it ended."""

    end = b""

    def __init__(
        self, draft: ResponseDraft, events: AsyncGenerator[list[Event]], *, ping_interval_s: float
    ):
        super().__init__(events, ping_interval_s=ping_interval_s)
        self._draft = draft

    def encode(self, event: Any) -> bytes:
        return named_event(event)

    def failure(self, body: dict[str, Any]) -> bytes:
        return b"".join(map(named_event, self._draft.failed(body["error"])))
