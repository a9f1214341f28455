"""Ends requests that take longer than their client (``X-Request-Timeout-Ms``) or the operator
allows. Ending one cancels its handler, which aborts it in the engine.
"""

import asyncio
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.errors import InvalidRequestError
from server.errors import DeadlineExceededError

HEADER = "x-request-timeout-ms"


class DeadlineMiddleware:
    """504 where no answer has begun. A stream that has is ended by whoever writes it, for whom the
    deadline, in the event loop's time, is in ``scope["state"]["deadline"]``.
    """

    def __init__(self, app: ASGIApp, request_timeout_s: float):
        self._app = app
        self._timeout_s = request_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get(HEADER)
        if given is not None and not re.fullmatch(r"0{0,9}[1-9][0-9]{0,9}", given):
            raise InvalidRequestError(
                f"The header {HEADER} must be a whole number of milliseconds above 0.",
                param=HEADER,
                code="invalid_value",
            )
        timeout_s = self._timeout_s if given is None else min(self._timeout_s, int(given) / 1000)
        scope["state"]["deadline"] = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout(timeout_s) as timeout:
                await self._app(scope, receive, _until_begun(send, timeout))
        except TimeoutError:
            if not timeout.expired():
                raise
            raise DeadlineExceededError("The request took longer than it was given.") from None


def _until_begun(send: Send, timeout: asyncio.Timeout) -> Send:
    """``send``, ending the timeout with the beginning of the answer."""

    async def send_in_time(message: Message) -> None:
        if message["type"] == "http.response.start":
            if timeout.expired():
                raise asyncio.CancelledError  # by a hair: another answer is on its way
            timeout.reschedule(None)
        await send(message)

    return send_in_time
