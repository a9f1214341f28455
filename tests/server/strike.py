"""A signal for the engine process while many clients stream, and what each of them saw."""

import asyncio
import os
import signal
import time
from dataclasses import dataclass

import httpx

from tests.server.command import Command, completion
from tests.server.sse import Stream, read_stream

STREAMS = 64


@dataclass
class Told:
    stream: Stream
    at: float  # when its last byte came


@dataclass
class Outcome:
    told: list[Told]
    struck: float
    not_ready_after: float  # seconds, like the next
    ready_after: float

    @property
    def told_after(self) -> list[float]:
        """Seconds, shortest first."""
        return sorted(told.at - self.struck for told in self.told)

    def check(self, within: float) -> None:
        """Everybody was told the truth, soon enough."""
        assert len(self.told) == STREAMS
        for told in self.told:
            assert told.stream.error is not None, "a false [DONE]"
            assert told.stream.error["code"] == "engine_unavailable"
        assert self.told_after[-1] < within


async def stream_until_told(
    http: httpx.AsyncClient, begun: asyncio.Semaphore, max_tokens: int
) -> Told:
    body = b""
    asked = completion(max_tokens, ignore_eos=True)
    async with http.stream("POST", "/v1/completions", **asked) as response:
        assert response.status_code == 200
        async for chunk in response.aiter_raw():
            if not body:
                begun.release()
            body += chunk
    return Told(read_stream(body), time.monotonic())


async def strike(
    url: str, command: Command, number: signal.Signals, *, max_tokens: int = 900_000
) -> Outcome:
    """Send the engine a signal while 64 clients stream ``max_tokens`` each."""
    begun = asyncio.Semaphore(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        streams = [
            asyncio.create_task(stream_until_told(http, begun, max_tokens)) for _ in range(STREAMS)
        ]
        for _ in range(STREAMS):
            await asyncio.wait_for(begun.acquire(), 60)
        (engine,) = command.engine_pids()
        os.kill(engine, number)
        struck = time.monotonic()
        while (await http.get("/health/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        not_ready = time.monotonic()
        told = await asyncio.gather(*streams)
        while (await http.get("/health/ready")).status_code != 200:
            assert (await http.get("/health/live")).status_code == 200
            await asyncio.sleep(0.05)
        ready = time.monotonic()
    return Outcome(told, struck, not_ready - struck, ready - struck)
