"""Server-sent events: how a stream begins, is kept alive, fails and ends. No OpenAI objects."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.disconnect import cancel, wait_for_disconnect
from server.errors import ClientGoneError, DeadlineExceededError, error_body, log_unexpected
from server.responses import encode_json

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def sse_event(payload: Any) -> bytes:
    return b"data: " + encode_json(payload) + b"\n\n"


def named_event(payload: dict[str, Any]) -> bytes:
    """An event whose name is the payload's ``type``."""
    return b"event: " + payload["type"].encode() + b"\n" + sse_event(payload)


class EventStream(Response):
    """Sends each object of ``events`` as one event, then ``end``. What comes in one list was there
    together and goes out in one write.

    Headers wait for the first event, so that an error before it is answered with its own status
    (it is raised here, for the exception handlers); or for the first ping, so that proxies see
    that somebody is alive. An error after that becomes the last event, and no ``end`` follows.
    ``events`` is closed in any case, which aborts the request when the client has gone.
    """

    media_type = "text/event-stream"
    end = DONE

    def __init__(self, events: AsyncGenerator[list[Any]], *, ping_interval_s: float):
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self._request_id = ""
        self._ping_interval_s = ping_interval_s
        self._started = False
        self._last_sent = 0.0
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._request_id = scope["state"]["request_id"]
        async with aclosing(self._events):
            writer = asyncio.create_task(self._write(send, scope["state"].get("deadline")))
            pinger = asyncio.create_task(self._ping(send))
            watcher = asyncio.create_task(wait_for_disconnect(receive))
            try:
                await asyncio.wait((writer, watcher), return_when=asyncio.FIRST_COMPLETED)
                if writer.done():
                    writer.result()
                    return
            finally:
                await cancel(writer, pinger, watcher)
        await self._fail(send, ClientGoneError())

    async def _write(self, send: Send, deadline: float | None) -> None:
        timeout = asyncio.timeout_at(deadline)
        try:
            async with timeout:
                async for events in self._events:
                    await self._send(send, b"".join(map(self.encode, events)))
        except Exception as raised:
            late = DeadlineExceededError("The request took longer than it was given.")
            await self._fail(send, late if timeout.expired() else raised)
        else:
            await self._send(send, self.end, more=False)

    async def _fail(self, send: Send, error: Exception) -> None:
        if not self._started:
            self._last_sent = math.inf  # no ping may start a response now
            raise error from None
        log_unexpected(error, self._request_id)
        last = self.failure(error_body(error, self._request_id))
        await self._send(send, last, more=False)

    def encode(self, event: Any) -> bytes:
        return sse_event(event)

    def failure(self, body: dict[str, Any]) -> bytes:
        """The last of a stream that fails; ``body`` as in an answer with an error's status."""
        return sse_event(body)

    async def _ping(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        self._last_sent = clock()
        while True:
            due = self._last_sent + self._ping_interval_s
            if clock() >= due:
                await self._send(send, PING)
            else:
                await asyncio.sleep(due - clock())

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        self._last_sent = asyncio.get_running_loop().time() if more else math.inf
        if not self._started:
            self._started = True
            headers = self.raw_headers
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})
