"""The smallest application: says how it was asked, and remembers it."""

import asyncio
import json
from typing import Any


class EchoApp:
    """Answers with method, path, headers and body size, once it has read the body.

    Path /early answers without reading; /stream sends chunks until nobody takes them; /large is
    100 kB; /break is as large, and raises just before its end; /late takes its time; /hold answers
    nothing.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []  # paths whose request was read to its end
        self.gone = 0  # requests whose client went first
        self.num_holding = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        size = 0
        more = path != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone += 1
                return
            size += len(message["body"])
            more = message["more_body"]
        self.seen.append(path)
        if path == "/stream":
            await self._stream(receive, send)
            return
        if path == "/hold":
            self.num_holding += 1
            while (await receive())["type"] != "http.disconnect":
                pass
            self.num_holding -= 1
            return
        if path == "/late":
            await asyncio.sleep(0.05)
        names = [name.decode() for name, _ in scope["headers"]]
        body = json.dumps([scope["method"], path, size, names]).encode()
        if path in ("/large", "/break"):
            body += b" " * 100_000
        length = len(body) + (path == "/break")
        headers = [(b"content-length", str(length).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if path == "/break":
            await send({"type": "http.response.body", "body": body, "more_body": True})
            raise ConnectionAbortedError("on purpose")
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            body = b"x" * 64 * 1024
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0)
        self.gone += 1
