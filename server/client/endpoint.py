"""What answers requests: a server at a URL, or the same application in this process, no port.

Both take the same routes and bodies, so that a local model means exactly what a served one does.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

from starlette.types import ASGIApp, Message

from jaxllm.async_llm import AsyncLLM
from jaxllm.bench.http_client import BaseURL, HTTPError, request
from jaxllm.bench.serve import ask_model, request_headers
from jaxllm.config.engine import EngineConfig
from server.app import create_app
from server.disconnect import cancel
from server.settings import ServerSettings


class Answer(Protocol):
    """Status, headers (names in lower case), and the body, which can be read once."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def parts(self) -> AsyncGenerator[bytes]:
        """The body as it comes. Raises HTTPError or OSError when it is cut off."""
        ...


class Endpoint(Protocol):
    model: str  # what to call the model

    def post(self, route: str, body: Mapping[str, Any]) -> AbstractAsyncContextManager[Answer]:
        """The answer, which is read inside the ``with``; leaving it early aborts the request.

        Raises:
            OSError, HTTPError: there is no answer.
        """
        ...


class RemoteEndpoint:
    """A server of anybody's make. $JAXLLM_API_KEY is sent as the key."""

    def __init__(self, base: BaseURL, model: str):
        self.model = model
        self._base = base

    @asynccontextmanager
    async def post(self, route: str, body: Mapping[str, Any]) -> AsyncGenerator[Answer]:
        content = json.dumps(body).encode()
        headers = request_headers()
        async with request(self._base, "POST", route, headers=headers, body=content) as response:
            yield response


class LocalEndpoint:
    """An ASGI application, called as a server would."""

    def __init__(self, app: ASGIApp, model: str):
        self.model = model
        self._app = app

    @asynccontextmanager
    async def post(self, route: str, body: Mapping[str, Any]) -> AsyncGenerator[Answer]:
        exchange = _Exchange(json.dumps(body).encode())
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": route,
            "raw_path": route.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        task = asyncio.create_task(exchange.run(self._app, scope))
        try:
            await exchange.begin()
            yield exchange
        finally:
            exchange.gone.set()
            await cancel(task)


class _Exchange:
    """One request and its answer, between the application and whoever asked."""

    def __init__(self, body: bytes):
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.gone = asyncio.Event()
        self._body: bytes | None = body
        # One place: the application waits for whoever reads slowly.
        self._messages: asyncio.Queue[Message | Exception | None] = asyncio.Queue(1)

    async def run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        end: Exception | None = None
        try:
            await app(scope, self._receive, self._messages.put)
        except Exception as error:
            end = error
        await self._messages.put(end)

    async def begin(self) -> None:
        message = await self._next()
        if message is None:
            raise HTTPError("the application gave no answer")
        self.status = message["status"]
        pairs = message.get("headers", ())
        self.headers = {name.decode().lower(): value.decode("latin-1") for name, value in pairs}

    async def parts(self) -> AsyncGenerator[bytes]:
        while (message := await self._next()) is not None:
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                return
        raise HTTPError("the answer was cut off")

    async def _next(self) -> Message | None:
        message = await self._messages.get()
        if isinstance(message, Exception):
            raise HTTPError("the application failed") from message
        return message

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def read_body(answer: Answer) -> bytes:
    async with aclosing(answer.parts()) as parts:
        return b"".join([part async for part in parts])


async def connect(url: str, model: str | None) -> RemoteEndpoint:
    """Raises ConfigError when nobody answers there. Without a name, the first that is served."""
    base = BaseURL.parse(url, flag="--url")
    return RemoteEndpoint(base, model or await ask_model(base, request_headers()))


@asynccontextmanager
async def local(
    config: EngineConfig, settings: ServerSettings | None = None
) -> AsyncGenerator[LocalEndpoint]:
    """An engine of one's own while it lasts. ``settings`` without names take the model's.

    Raises:
        ConfigError, EngineDeadError: the engine cannot start.
    """
    settings = settings or ServerSettings(access_log="off")
    names = settings.served_model_names or (config.model,)
    client = AsyncLLM(config)
    try:
        await client.start()
        app = create_app(client, replace(settings, served_model_names=names))
        yield LocalEndpoint(app, names[0])
    finally:
        await client.shutdown()  # also of an engine that Ctrl-C found starting
