"""Typed errors to HTTP answers: status, headers and OpenAI's error body, in one place.

Knows no routes. The text of an unforeseen error never leaves the process.
"""

import logging
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxllm.errors import (
    AuthenticationError,
    InvalidRequestError,
    JaxLLMError,
)
from server.anthropic.errors import anthropic_error, speaks_anthropic
from server.responses import JSONResponse

logger = logging.getLogger(__name__)


class UnknownURLError(InvalidRequestError):
    status = 404
    code = "unknown_url"


class MethodNotAllowedError(InvalidRequestError):
    status = 405
    code = "method_not_allowed"


class BodyTooLargeError(InvalidRequestError):
    status = 413
    code = "request_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    status = 415
    code = "unsupported_media_type"


class MalformedHTTPError(InvalidRequestError):
    """What came is not a request, or two servers could read it differently."""

    code = "malformed_http"


class HeadTooLargeError(InvalidRequestError):
    status = 431
    code = "headers_too_large"


class SlowRequestError(InvalidRequestError):
    """A request's head or body did not arrive in time."""

    status = 408
    code = "request_timeout"


class HostNotAllowedError(InvalidRequestError):
    status = 403
    code = "host_not_allowed"


class OriginNotAllowedError(InvalidRequestError):
    status = 403
    code = "origin_not_allowed"


class TooManyConnectionsError(JaxLLMError):
    status = 503
    code = "too_many_connections"
    retry_after_s = 1.0


class ClientGoneError(InvalidRequestError):
    """Read only by clients that have closed their half of the connection and no more; of all others
    it shows in the access log.
    """

    status = 499
    code = "client_closed_request"

    def __init__(self) -> None:
        super().__init__(
            "The client closed its side of the connection before the answer was there. Keep it "
            "open until the answer has come."
        )


class DeadlineExceededError(JaxLLMError):
    """The request took longer than its client, or the operator, allows."""

    status = 504
    code = "deadline_exceeded"


def error_body(error: Exception, request_id: str) -> dict[str, Any]:
    """OpenAI's error object, always with its four keys."""
    if not isinstance(error, JaxLLMError) or _is_internal(error):
        error = JaxLLMError(
            "The server had an error while processing your request. "
            f"Please give request id {request_id} when you report it."
        )
    return {"error": {name: getattr(error, name) for name in ("message", "type", "param", "code")}}


def error_status(error: Exception) -> int:
    return error.status if isinstance(error, JaxLLMError) else JaxLLMError.status


class ErrorResponse(JSONResponse):
    """In OpenAI's form, or the one that clients of the request's path expect."""

    def __init__(self, body: dict[str, Any], status: int, headers: dict[str, str]):
        super().__init__(body, status, headers)
        self._error = body["error"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if speaks_anthropic(scope.get("path", "")):
            request_id = self.headers["x-request-id"]
            self.body = self.render(anthropic_error(self._error, self.status_code, request_id))
            self.headers["content-length"] = str(len(self.body))
            self.headers["request-id"] = request_id
        await super().__call__(scope, receive, send)


def error_response(error: Exception, request_id: str) -> Response:
    headers = _headers(error) | {"x-request-id": request_id}
    return ErrorResponse(error_body(error, request_id), error_status(error), headers)


def log_unexpected(error: Exception, request_id: str) -> None:
    """Our own faults leave a traceback in the log, under the id that the client was given."""
    if not isinstance(error, JaxLLMError) or _is_internal(error):
        logger.error("Request %s failed", request_id, exc_info=error)


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for everything that was foreseen."""
    request_id: str = request.scope["state"]["request_id"]
    if isinstance(error, ClientDisconnect):  # in the middle of its request
        error = ClientGoneError()
    if isinstance(error, HTTPException):
        return _http_exception_response(request, error, request_id)
    log_unexpected(error, request_id)
    return error_response(error, request_id)


def _http_exception_response(request: Request, error: HTTPException, request_id: str) -> Response:
    """Starlette's own refusals: unknown path, wrong method."""
    where = f"{request.method} {request.scope['path'][:128]}"
    if error.status_code == 405:
        typed: JaxLLMError = MethodNotAllowedError(f"{where}: this method is not allowed here.")
    elif error.status_code == 404:
        typed = UnknownURLError(f"Unknown request URL: {where}. Please check it for typos.")
    else:
        typed = InvalidRequestError(str(error.detail))
    headers = {"x-request-id": request_id, **(error.headers or {})}
    return ErrorResponse(error_body(typed, request_id), error.status_code, headers)


def _is_internal(error: JaxLLMError) -> bool:
    return error.code == JaxLLMError.code


def _headers(error: Exception) -> dict[str, str]:
    """``x-should-retry`` keeps clients from sending a request again that would fail again."""
    if isinstance(error, AuthenticationError):
        return {"www-authenticate": "Bearer"}
    seconds = error.retry_after_s if isinstance(error, JaxLLMError) else None
    if seconds is not None:
        return {
            "retry-after": str(math.ceil(seconds)),
            "retry-after-ms": str(round(seconds * 1000)),
        }
    return {"x-should-retry": "false"} if error_status(error) >= 500 else {}
