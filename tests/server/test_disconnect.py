"""A client that leaves frees its blocks within two steps, at whatever point of its request's life.

The real application on a real port, a real scheduler, steps made one by one: nothing here depends
on time.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.server.sse import read_stream
from tests.server.stepped_server import Client, Server, serving

REPEATS = 50
MAX_STEPS = 2  # between the notice and free blocks


async def in_the_inbox(server: Server, client: Client) -> None:
    """The engine has not looked at it yet."""


async def queued(server: Server, client: Client) -> None:
    """It waits behind two that run."""
    server.engine.step()
    assert server.engine.core.stats().num_waiting


async def prefilling(server: Server, client: Client) -> None:
    told = server.engine.num_told
    server.engine.step()
    server.engine.step()
    assert server.engine.num_told == told


async def first_token(server: Server, client: Client) -> None:
    """It is on its way to the client."""
    server.engine.step_until_told()


async def decoding(server: Server, client: Client) -> None:
    for _ in range(4):
        server.engine.step_until_told()
        await asyncio.sleep(0)


async def last_token(server: Server, client: Client) -> None:
    """The engine is done with it, the client not yet told."""
    while server.engine.scheduler.requests:
        server.engine.step()


@pytest.mark.parametrize(
    "stage", [in_the_inbox, queued, prefilling, first_token, decoding, last_token]
)
def test_blocks_are_free_two_steps_after_a_client_left(
    tiny_tokenizer_dir: Path, stage: Callable[[Server, Client], Awaitable[None]]
) -> None:
    async def run() -> list[int]:
        async with serving(tiny_tokenizer_dir, prefix_caching=False) as server:  # all compute
            steps: list[int] = []
            for i in range(REPEATS):
                ahead = 2 if stage is queued else 0
                company = [await server.ask(prompt="y", max_tokens=20) for _ in range(ahead)]
                n = 1 + (i % 5 == 0 and stage is not prefilling)
                client = await server.ask(stream=i % 2 == 0, max_tokens=12, n=n)
                await stage(server, client)
                client.leave(politely=i % 3 == 0)
                steps.append(await server.steps_until_free(client))
                for other in company:
                    other.leave(politely=True)
                    await server.steps_until_free(other)
                assert server.engine.at_rest
            return steps

    steps = asyncio.run(run())
    assert len(steps) == REPEATS and max(steps) <= MAX_STEPS


def test_the_others_do_not_notice(tiny_tokenizer_dir: Path) -> None:
    """A stream in the company of clients that leave is the same as alone."""

    async def run(companions: int) -> bytes:
        async with serving(tiny_tokenizer_dir) as server:
            victim = await server.ask(max_tokens=24, seed=1)
            answer = asyncio.create_task(victim.body())
            for i in range(companions):
                assert not answer.done()
                other = await server.ask(prompt="y" * (1 + i % 40), max_tokens=20)
                for _ in range(1 + i % 3):
                    server.engine.step()
                other.leave(politely=False)
                await server.steps_until_free(other)
            while server.engine.busy:
                server.engine.step()
                await asyncio.sleep(0)
            return await asyncio.wait_for(answer, 20)

    def text(body: bytes) -> str:
        stream = read_stream(body)
        assert stream.done
        return "".join(chunk["choices"][0]["text"] for chunk in stream.objects)

    alone, accompanied = asyncio.run(run(0)), asyncio.run(run(6))
    assert text(alone) == text(accompanied) != ""


@pytest.mark.parametrize("stage", [queued, decoding])
def test_a_half_closed_client_has_left_but_is_told_so(
    tiny_tokenizer_dir: Path, stage: Callable[[Server, Client], Awaitable[None]]
) -> None:
    async def run() -> tuple[bytes, int]:
        async with serving(tiny_tokenizer_dir) as server:
            ahead = 2 if stage is queued else 0
            company = [await server.ask(prompt="y", max_tokens=20) for _ in range(ahead)]
            client = await server.ask(max_tokens=12)
            await stage(server, client)
            client.writer.write_eof()
            steps = await server.steps_until_free(client)
            for other in company:
                other.leave(politely=False)
                await server.steps_until_free(other)
            answer = await asyncio.wait_for(client.reader.read(), 20)
            client.leave(politely=True)
            return answer, steps

    answer, steps = asyncio.run(run())
    assert steps <= MAX_STEPS
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"client_closed_request" in body and b"[DONE]" not in body
    assert head.startswith(b"HTTP/1.1 499" if stage is queued else b"HTTP/1.1 200")
    assert stage is queued or body.endswith(b"0\r\n\r\n")
