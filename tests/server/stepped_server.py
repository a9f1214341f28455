"""The real application on a real port over a stepped engine, and clients of it, all in one loop."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from jaxllm.async_llm import AsyncLLM
from server.app import create_app
from server.protocol.http import http_protocol
from server.protocol.limits import ConnectionLimits
from server.protocol.refusals import RefusalLog
from server.settings import ServerSettings
from tests.server.stepped_engine import SteppedEngine, stepped_llm

PROMPT = "x" * 40  # three chunks of prefill
PLAN = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64, "num_blocks": 64}


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    engine_ids: set[str]

    async def body(self) -> bytes:
        """The rest of a chunked answer, from its head on."""
        await self.reader.readuntil(b"\r\n\r\n")
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        self.writer.close()
        return body

    def leave(self, *, politely: bool) -> None:
        if politely:
            self.writer.close()
        else:  # with a reset
            self.writer.transport.abort()


@dataclass
class Server:
    llm: AsyncLLM
    engine: SteppedEngine
    port: int

    async def ask(self, *, stream: bool = True, prompt: str = PROMPT, **more: Any) -> Client:
        """Send a request and wait until it is in the engine's inbox."""
        body = {"model": "fake", "prompt": prompt, "stream": stream, "ignore_eos": True} | more
        content = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        )
        received, before = self.engine.received, len(self.engine.received)
        await until(lambda: len(received) == before + more.get("n", 1))
        return Client(reader, writer, {message.request_id for message in received[before:]})

    async def steps_until_free(self, client: Client) -> int:
        """Steps from the server's notice that the client has gone until nothing is left of it."""
        await until(lambda: not client.engine_ids & self._known())
        steps = 0
        engine = self.engine
        while not engine.inbox.empty() or client.engine_ids & engine.scheduler.requests.keys():
            self.engine.step()
            steps += 1
            assert steps < 20
        return steps

    def _known(self) -> set[str]:
        return {name for state in self.llm._outputs.running() for name in state.unfinished_ids()}


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


@asynccontextmanager
async def serving(tokenizer_dir: Path, **plan: Any) -> AsyncGenerator[Server]:
    """A server with room for two requests and chunks of 16 tokens, unless ``plan`` says other."""
    llm, engine = await stepped_llm(tokenizer_dir, **(PLAN | plan))
    app = create_app(llm, ServerSettings(served_model_names=("fake",)))
    protocol = http_protocol(ConnectionLimits(), RefusalLog())
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off", http=protocol)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        yield Server(llm, engine, listener.getsockname()[1])
        server.should_exit = True
        await running
