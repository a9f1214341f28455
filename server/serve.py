"""``jaxllm serve``: binds the port, starts the engine, then listens; ends both cleanly.

The port is bound first, so that a port in use is found before a model is loaded; nothing listens on
it until the engine is ready.
"""

import asyncio
import ipaddress
import json
import logging
import math
import shlex
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn, override

import uvicorn

from jaxllm.async_llm import AsyncLLM
from jaxllm.config import env
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError
from server.app import create_app
from server.disconnect import cancel
from server.settings import ServerSettings

KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that none dies under a request
DRAIN_S = 3.0  # what running requests get to end after Ctrl-C; then they get an error
FORCE_S = 5  # after that, whoever still does not read its answer is cut off
MAX_HEAD_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the command line says about the server."""

    host: str
    port: int
    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...]
    insecure_no_auth: bool
    max_num_queued_reqs: int | None
    strict_params: bool
    log_level: str


def serve(config: EngineConfig, options: ServeOptions) -> int:
    """Serve until Ctrl-C or SIGTERM; both end it with exit code 0.

    Raises:
        ConfigError: the address cannot be used, or the engine cannot start.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    api_keys = options.api_keys or env.api_keys()
    check_exposure(options.host, api_keys, options.insecure_no_auth)
    signal.signal(signal.SIGTERM, _exit_at_once)
    with bind(options.host, options.port) as listener:
        try:
            asyncio.run(_serve(config, options, api_keys, listener))
        except (KeyboardInterrupt, SystemExit) as end:
            return end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 0
    return 0


async def _serve(
    config: EngineConfig,
    options: ServeOptions,
    api_keys: tuple[str, ...],
    listener: socket.socket,
) -> None:
    client = AsyncLLM(config)
    try:
        await client.start()
        settings = ServerSettings(
            served_model_names=options.served_model_names,
            api_keys=api_keys,
            max_num_queued_reqs=options.max_num_queued_reqs,
            max_num_seqs=int(client.engine.summary.get("max_num_seqs", 0)),
            strict_params=options.strict_params,
        )
        app = create_app(client, settings, on_shutdown=client.shutdown)
        await _Server(app, options, listener, client.shutdown).serve(sockets=[listener])
    finally:
        await client.shutdown()


class _Server(uvicorn.Server):
    """uvicorn, with our own words when it is up, and an end for requests that take too long."""

    def __init__(
        self,
        app: object,
        options: ServeOptions,
        listener: socket.socket,
        stop_engine: Callable[[], Awaitable[None]],
    ):
        config = uvicorn.Config(
            app,  # pyright: ignore[reportArgumentType]
            log_config=None,
            log_level=options.log_level if options.log_level != "info" else "warning",
            access_log=options.log_level == "debug",
            lifespan="on",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(DRAIN_S) + FORCE_S,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        super().__init__(config)
        self._url = url_of(listener)
        self._model = options.served_model_names[0]
        self._stop_engine = stop_engine

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(ready_line(self._url, self._model), flush=True)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        await cancel(drain)

    async def _end_requests(self) -> None:
        """Every stream that still runs ends with an error event, as its client expects."""
        await asyncio.sleep(DRAIN_S)
        await self._stop_engine()


def ready_line(url: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    return (
        f"jaxllm: ready on {url} - try: curl {url}/v1/chat/completions "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )


def check_exposure(host: str, api_keys: tuple[str, ...], insecure_no_auth: bool) -> None:
    """Raises ConfigError for a server that anybody on the network could use without a key."""
    if api_keys or insecure_no_auth or is_loopback(host):
        return
    raise ConfigError(
        f"Refusing to listen on {host} without an API key: anybody who reaches it could use it. "
        "Give --api-key (or JAXLLM_API_KEY), or accept it with --insecure-no-auth."
    )


def is_loopback(host: str) -> bool:
    """Only this machine can reach ``host``. A name must resolve to such addresses only."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(item[4][0])).is_loopback for item in found)


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet.

    Raises:
        ConfigError: the address is taken, not ours, or does not exist.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, got {port}.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. "
            "Choose another with --host, --port."
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _exit_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM ends like Ctrl-C: through every ``finally``, with exit code 0."""
    raise SystemExit(0)
