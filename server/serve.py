"""``jaxllm serve``: binds the port, starts the engine, then listens; ends both cleanly.

The port is bound first, so that a port in use is found before a model is loaded; nothing listens on
it until the engine is ready.
"""

import asyncio
import gc
import json
import logging
import shlex
import signal
import socket
import sys
from collections.abc import Coroutine
from dataclasses import replace
from types import FrameType
from typing import Any, NoReturn, override

import uvicorn
from starlette.applications import Starlette

from jaxllm.async_llm import AsyncLLM
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import EngineDeadError
from server.access_log import start_logging
from server.app import create_app
from server.disconnect import cancel
from server.drain import Drain
from server.listen import bind, guarded, url_of
from server.protocol.http import http_protocol
from server.protocol.limits import ConnectionLimits
from server.settings import ServerSettings
from server.tracing import open_tracer

KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that none dies under a request
FORCE_S = 5  # after the drain; then whoever does not read its answer is cut off

logger = logging.getLogger(__name__)


def serve(config: EngineConfig, settings: ServerSettings) -> int:
    """Serve until Ctrl-C or SIGTERM; both end it with exit code 0, after a drain.

    Raises:
        ConfigError: the address, a key or the traces' endpoint cannot be used, or the engine
            cannot start.
        EngineDeadError: the engine died too often.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    settings = guarded(settings)
    if settings.tenant_weights:
        weights = (*config.tenant_weights, *settings.tenant_weights)
        config = replace(config, tenant_weights=weights)
    signal.signal(signal.SIGTERM, _exit_at_once)
    with bind(settings.host, settings.port) as listener:
        try:
            asyncio.run(_serve(config, settings, listener))
        except (KeyboardInterrupt, SystemExit, asyncio.CancelledError) as end:
            return end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 0
    return 0


async def _serve(config: EngineConfig, settings: ServerSettings, listener: socket.socket) -> None:
    _cancel_at_sigterm()
    endpoint = settings.otlp_traces_endpoint
    tracer = None if endpoint is None else open_tracer(endpoint)
    client = AsyncLLM(config)
    try:
        await client.start()
        gc.collect()
        gc.freeze()  # vocabulary and code live as long as the process: never look at them again
        summary = client.engine.summary
        settings = replace(
            settings,
            served_model_names=settings.served_model_names or (config.model,),
            max_num_seqs=int(summary.get("max_num_seqs", 0)),
            kv_cache_tokens=int(summary.get("kv_tokens", 0)),
            fair=config.scheduling_policy == "fair",
        )
        start_logging(settings.access_log)
        server = _Server(client, settings, listener, create_app(client, settings, tracer))
        await server.serve(sockets=[listener])
        if server.failure is not None:
            raise EngineDeadError(server.failure)
    finally:
        await client.shutdown()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


class _Server(uvicorn.Server):
    """uvicorn with our own words when it is up, and our own end.

    The first SIGTERM or Ctrl-C begins a drain, the second ends it. An engine that is given up ends
    the server too; ``failure`` says why.
    """

    def __init__(
        self, client: AsyncLLM, settings: ServerSettings, listener: socket.socket, app: Starlette
    ):
        limits = ConnectionLimits(
            max_connections=settings.max_connections, max_body_bytes=settings.max_body_bytes
        )
        config = uvicorn.Config(
            app,
            http=http_protocol(limits, app.state.serving.refusals),
            log_config=None,
            log_level=settings.log_level if settings.log_level != "info" else "warning",
            access_log=False,  # ours is server/access_log.py
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FORCE_S,
        )
        super().__init__(config)
        self.failure: str | None = None
        self._client = client
        self._drain: Drain = app.state.serving.drain
        self._drain_timeout = settings.drain_timeout
        self._url = url_of(listener)
        self._model = settings.served_model_names[0]
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._start(self._end_when_hopeless())
        print(ready_line(self._url, self._model), flush=True)

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._on_signal)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._client.shutdown(at_once=self.force_exit)  # what still runs ends with an error
        await super().shutdown(sockets)
        await cancel(*self._tasks)

    def _on_signal(self) -> None:
        if not self._drain.begun:
            self._drain.begin()
            self._start(self._end_when_drained())
        elif not self.force_exit:
            self.should_exit = self.force_exit = True
            self.config.timeout_graceful_shutdown = 1  # time to write the last event
            self._start(self._client.shutdown(at_once=True))

    async def _end_when_drained(self) -> None:
        if self._drain.num_requests:
            logger.warning(
                "Shutting down: %d requests have %g s to finish. Once more to end at once.",
                self._drain.num_requests,
                self._drain_timeout,
            )
        try:
            async with asyncio.timeout(self._drain_timeout):
                await self._drain.finish()
        except TimeoutError:
            logger.warning("%d requests end with an error.", self._drain.num_requests)
        self.should_exit = True

    async def _end_when_hopeless(self) -> None:
        self.failure = await self._client.engine.given_up()
        self.should_exit = True

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))


def ready_line(url: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    return (
        f"jaxllm: ready on {url} - try: curl {url}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )


def _exit_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends like Ctrl-C: through every ``finally``, with exit code 0."""
    raise SystemExit(0)


def _cancel_at_sigterm() -> None:
    """SIGTERM cancels this task, as asyncio has Ctrl-C do. An exception out of the handler would
    tear up the start of a process halfway, and leave the process behind.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
