"""AsyncLLM keeps its figures right however requests end; over the real engine core."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from jaxllm.async_llm import AsyncLLM
from jaxllm.errors import EngineDeadError
from jaxllm.outputs import RequestMetrics, RequestOutput
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from tests.server.stepped_engine import SteppedEngine, stepped_llm


async def finish(llm: AsyncLLM, engine: SteppedEngine, params: SamplingParams) -> RequestOutput:
    """The last output of a request that runs alone."""
    task = asyncio.create_task(_last(llm, params))
    await asyncio.sleep(0)
    while not task.done():
        engine.step()
        for _ in range(5):
            await asyncio.sleep(0)
    return task.result()


async def _last(llm: AsyncLLM, params: SamplingParams) -> RequestOutput:
    outputs = [output async for output in llm.generate("abc", params)]
    return outputs[-1]


def params(max_tokens: int, **more: object) -> SamplingParams:
    kind = RequestOutputKind.DELTA
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, output_kind=kind, **more)  # type: ignore[arg-type]


async def to_the_end(tokenizer_dir: Path) -> None:
    llm, engine = await stepped_llm(tokenizer_dir)
    output = await finish(llm, engine, params(5))
    found = output.metrics
    assert isinstance(found, RequestMetrics)
    stamps = (found.queued_ts, found.scheduled_ts, found.first_token_ts, found.last_token_ts)
    assert None not in stamps and list(stamps) == sorted(stamps)  # type: ignore[type-var]
    assert found.num_generation_tokens == 5
    output = await finish(llm, engine, params(4, n=2, seed=1))
    assert output.metrics is not None and output.metrics.num_generation_tokens == 8
    metrics = llm.metrics
    assert metrics.finished == {"length": 3, "stop": 0, "abort": 0, "error": 0}
    assert metrics.num_generation_tokens == 13
    assert metrics.num_prompt_tokens == 3 * len(output.prompt_token_ids)
    assert metrics.inter_token_latency.cumulative()[-1][1] == 13 - 3
    assert metrics.step_tokens.sum == engine.core.stats().num_tokens
    assert metrics._running == {}


async def before_its_end(tokenizer_dir: Path) -> None:
    llm, engine = await stepped_llm(tokenizer_dir)

    async def leave() -> None:
        async with aclosing(llm.generate("abc", params(50))) as outputs:
            await anext(outputs)

    task = asyncio.create_task(leave())
    await asyncio.sleep(0)
    while not task.done():
        engine.step()
        for _ in range(5):
            await asyncio.sleep(0)
    assert llm.metrics.finished["abort"] == 1
    dying = asyncio.create_task(_last(llm, params(50)))
    await asyncio.sleep(0)
    engine.step()
    llm._on_death(EngineDeadError("gone"))
    with pytest.raises(EngineDeadError):
        await dying
    assert llm.metrics.finished == {"length": 0, "stop": 0, "abort": 1, "error": 1}
    assert llm.metrics.num_engine_deaths == 1
    assert llm.metrics.e2e_latency.cumulative()[-1][1] == 0
    assert llm.metrics._running == {}


def test_requests_that_run_to_their_end(tiny_tokenizer_dir: Path) -> None:
    asyncio.run(to_the_end(tiny_tokenizer_dir))


def test_requests_that_are_left_or_fail(tiny_tokenizer_dir: Path) -> None:
    asyncio.run(before_its_end(tiny_tokenizer_dir))


def test_none_before_the_start() -> None:
    with pytest.raises(EngineDeadError):
        _ = AsyncLLM(model="fake").metrics
