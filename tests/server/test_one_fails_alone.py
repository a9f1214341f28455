"""One request whose computation goes wrong fails alone; the streams beside it do not notice."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from jaxllm.simulation.fake_executor import Fault
from tests.server.sse import Stream, read_stream
from tests.server.stepped_server import serving

COMPANY = 6
PLAN = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 200}


def failing_at(victim: str, length: int) -> Fault:
    """The device raises whenever the victim is among the rows with that many tokens or more."""

    def fault(number: int, step: Any) -> str | None:
        ends = (step.starts + step.num_new_tokens).tolist()
        hit = any(
            request_id == victim and end >= length
            for request_id, end in zip(step.request_ids, ends, strict=True)
        )
        return "fetch" if hit else None

    return fault


async def answers(tokenizer_dir: Path, how: str | None) -> tuple[list[Stream], Stream | None]:
    """Streams of the company, and of the victim that fails as told."""
    async with serving(tokenizer_dir, **PLAN) as server:
        prompts = [chr(97 + i) * (3 + 5 * i) for i in range(COMPANY)]
        clients = [
            await server.ask(prompt=prompt, max_tokens=15, seed=i, stream=True)
            for i, prompt in enumerate(prompts)
        ]
        if how is not None:
            clients.append(await server.ask(prompt="victim", max_tokens=15))
            (victim,) = clients[-1].engine_ids
            if how == "not finite":
                server.engine.executor.not_finite = {victim: 10}
            else:
                server.engine.executor.fault = failing_at(victim, 10)
        bodies = [asyncio.create_task(client.body()) for client in clients]
        while server.engine.busy:
            server.engine.step()
            await asyncio.sleep(0)
        streams = [read_stream(await asyncio.wait_for(body, 20)) for body in bodies]
        assert server.engine.at_rest
        return streams[:COMPANY], streams[-1] if how is not None else None


def text(stream: Stream) -> str:
    assert stream.done
    return "".join(chunk["choices"][0]["text"] for chunk in stream.objects)


@pytest.mark.parametrize("how", ["not finite", "raises"])
def test_the_others_are_the_same_as_without_it(tiny_tokenizer_dir: Path, how: str) -> None:
    undisturbed, _ = asyncio.run(answers(tiny_tokenizer_dir, None))
    company, victim = asyncio.run(answers(tiny_tokenizer_dir, how))
    assert list(map(text, company)) == list(map(text, undisturbed))
    assert victim is not None and victim.error is not None
    assert victim.error["code"] == "request_failed"
