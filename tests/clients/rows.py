"""What can go wrong, as a client sees it: one row per status of the API, and who gives it."""

import re
from collections.abc import AsyncGenerator
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import Any

from jaxllm.errors import EngineDeadError, JaxLLMError, QueueFullError, RequestFailedError
from jaxllm.frontend.client import Prompt
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import SamplingParams
from server.errors import SlowRequestError
from tests.server.fake_client import FakeClient

KEY = "sk-real-clients"
MODEL = "fake"
MAX_BODY_BYTES = 64 * 1024
RETRIES = 2  # what the clients are told, and their default


def soon(error: JaxLLMError) -> JaxLLMError:
    """Worth asking again at once, so that the tests need not wait."""
    error.retry_after_s = 0.02
    return error


FAULTS: dict[str, Exception] = {
    "queue_full": soon(QueueFullError("Too many requests are waiting.")),
    "engine_away": soon(EngineDeadError("The engine is being restarted.")),
    "heals": soon(EngineDeadError("The engine is being restarted.")),
    "slow_request": SlowRequestError("The body did not arrive in time."),
    "our_fault": RuntimeError("a secret of ours"),
    "request_failed": RequestFailedError("The numbers are not finite."),
    "stream_breaks": EngineDeadError("The engine has died."),
}


class FaultyEngine(FakeClient):
    """Fails requests whose prompt says so: ``fault:NAME`` names one of ``FAULTS``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.healthy = True

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, **more: Any
    ) -> AsyncGenerator[RequestOutput]:
        found = re.search(r"fault:(\w+)", prompt) if isinstance(prompt, str) else None
        fault = found[1] if found else None
        if fault == "heals":  # every second time
            self.healthy = not self.healthy
            fault = None if self.healthy else fault
        if fault is not None and fault != "stream_breaks":
            raise copy(FAULTS[fault])
        num_told = 0
        async for output in super().generate(prompt, sampling_params, **more):
            yield output
            num_told += 1
            if fault == "stream_breaks" and num_told == 3:
                raise copy(FAULTS[fault])


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A request, and what comes of it. ``requests``: how often it is sent, retries included."""

    name: str
    status: int | None  # None: inside of a stream
    code: str | None
    error: str  # class of openai-python, and of openai for Node
    requests: int = 1
    path: str = "/chat/completions"
    body: dict[str, Any] = field(default_factory=dict)
    raw: str | None = None  # instead of ``body``
    headers: dict[str, str] = field(default_factory=dict)
    key: str = KEY
    method: str = "post"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"body": chat(**self.body)}


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": fields.pop("content", "Hi")}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 8} | fields
    return {name: value for name, value in body.items() if value != "ABSENT"}


def fault(name: str) -> dict[str, Any]:
    return {"content": f"fault:{name}"}


BAD, STATUS, SERVER = "BadRequestError", "APIStatusError", "InternalServerError"
ROWS = (
    Row(name="invalid_json", status=400, code="invalid_json", error=BAD, raw="{"),
    Row(
        name="missing_field",
        status=400,
        code="missing_required_parameter",
        error=BAD,
        body={"messages": "ABSENT"},
    ),
    Row(
        name="wrong_type",
        status=400,
        code="invalid_type",
        error=BAD,
        body={"temperature": "hot"},
    ),
    Row(
        name="out_of_range",
        status=400,
        code="decimal_above_max_value",
        error=BAD,
        body={"top_p": 1.5},
    ),
    Row(
        name="refused_field",
        status=400,
        code="unsupported_parameter",
        error=BAD,
        path="/completions",
        body={"messages": "ABSENT", "prompt": "Hi", "suffix": "there"},
    ),
    Row(
        name="too_long",
        status=400,
        code="context_length_exceeded",
        error=BAD,
        body={"content": "x" * 2000},
    ),
    Row(
        name="unknown_model",
        status=404,
        code="model_not_found",
        error="NotFoundError",
        body={"model": "gpt-none"},
    ),
    Row(
        name="wrong_key",
        status=401,
        code="invalid_api_key",
        error="AuthenticationError",
        key="sk-wrong",
    ),
    Row(
        name="other_host",
        status=403,
        code="host_not_allowed",
        error="PermissionDeniedError",
        headers={"Host": "evil.example"},
    ),
    Row(name="unknown_url", status=404, code="unknown_url", error="NotFoundError", path="/nothing"),
    Row(
        name="wrong_method",
        status=405,
        code="method_not_allowed",
        error=STATUS,
        method="get",
    ),
    Row(
        name="media_type",
        status=415,
        code="unsupported_media_type",
        error=STATUS,
        headers={"Content-Type": "text/plain"},
    ),
    Row(
        name="body_too_large",
        status=413,
        code="request_too_large",
        error=STATUS,
        body={"content": "x" * (MAX_BODY_BYTES + 1)},
    ),
    Row(
        name="headers_too_large",
        status=431,
        code="headers_too_large",
        error=STATUS,
        headers={"X-Long": "x" * 40_000},
    ),
    Row(
        name="slow_request",
        status=408,
        code="request_timeout",
        error=STATUS,
        requests=1 + RETRIES,
        body=fault("slow_request"),
    ),
    Row(
        name="queue_full",
        status=429,
        code="server_overloaded",
        error="RateLimitError",
        requests=1 + RETRIES,
        body=fault("queue_full"),
    ),
    Row(
        name="engine_away",
        status=503,
        code="engine_unavailable",
        error=SERVER,
        requests=1 + RETRIES,
        body=fault("engine_away"),
    ),
    Row(
        name="deadline",
        status=504,
        code="deadline_exceeded",
        error=SERVER,
        headers={"X-Request-Timeout-Ms": "1"},
        body={"content": "Hi", "max_tokens": 100, "ignore_eos": True},
    ),
    Row(name="our_fault", status=500, code="internal_error", error=SERVER, body=fault("our_fault")),
    Row(
        name="request_failed",
        status=500,
        code="request_failed",
        error=SERVER,
        body=fault("request_failed"),
    ),
    Row(
        name="heals",
        status=200,
        code=None,
        error="",
        requests=2,
        body=fault("heals"),
    ),
    Row(
        name="stream_breaks",
        status=None,
        code="engine_unavailable",
        error="APIError",
        body=fault("stream_breaks") | {"stream": True, "max_tokens": 100},
    ),
)
