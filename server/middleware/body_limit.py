"""Refuses bodies above a size, by what they claim or by what really comes."""

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTooLargeError, error_response


class BodyLimitMiddleware:
    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _claimed_bytes(scope) > self._max_bytes:
            response = error_response(self._error(), scope["state"]["request_id"])
            await response(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._error()
            return message

        await self._app(scope, receive_counted, send)

    def _error(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"The request body is larger than {self._max_bytes} bytes. Send a smaller one."
        )


def _claimed_bytes(scope: Scope) -> float:
    """Content-Length; infinite when it is no number, or too long to be one."""
    claimed = Headers(scope=scope).get("content-length", "0")
    return int(claimed) if re.fullmatch(r"[0-9]{1,15}", claimed) else float("inf")
