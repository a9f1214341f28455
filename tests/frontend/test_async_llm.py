"""AsyncLLM with a real child process and a fake engine in it."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from jaxllm.async_llm import AsyncLLM
from jaxllm.errors import (
    ContextLengthExceededError,
    EngineDeadError,
    InvalidRequestError,
    RequestFailedError,
)
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from tests.frontend.fake_worker import BLOCKING, DEADLY, POISON, REFUSED

pytestmark = pytest.mark.alone

Settings = Callable[..., dict[str, Any]]
DELTA = RequestOutputKind.DELTA


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams, **more: Any):
    return [output async for output in llm.generate(prompt, params, **more)]


def text(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(c.text for o in outputs for c in o.outputs if c.index == index)


def run(body: Callable[[AsyncLLM], Any], worker: str, settings: dict[str, Any]) -> Any:
    async def main() -> Any:
        async with AsyncLLM(worker_module=worker, **settings) as llm:
            return await asyncio.wait_for(body(llm), 90)

    return asyncio.run(main())


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_generates_streams_and_refuses(fake_worker: str, settings: Settings) -> None:
    async def body(llm: AsyncLLM) -> None:
        deltas = await collect(llm, "héllo", SamplingParams(max_tokens=10, output_kind=DELTA))
        assert text(deltas) == "héllohél"
        assert deltas[-1].finished and deltas[-1].outputs[0].finish_reason == "length"
        assert sum(len(o.outputs[0].token_ids) for o in deltas) == 10

        final = RequestOutputKind.FINAL_ONLY
        (whole,) = await collect(
            llm, "abcd", SamplingParams(max_tokens=50, stop="da", output_kind=final)
        )
        assert (whole.outputs[0].text, whole.outputs[0].stop_reason) == ("abc", "da")

        (many,) = await collect(llm, "ab", SamplingParams(n=3, max_tokens=4, output_kind=final))
        assert [c.text for c in many.outputs] == ["abab"] * 3
        assert [c.index for c in many.outputs] == [0, 1, 2]

        many_deltas = await collect(llm, "ab", SamplingParams(n=3, max_tokens=4, output_kind=DELTA))
        assert [text(many_deltas, i) for i in range(3)] == ["abab"] * 3

        with pytest.raises(ContextLengthExceededError):
            await collect(llm, "a" * 300, SamplingParams())
        with pytest.raises(InvalidRequestError):
            await collect(llm, [999], SamplingParams())
        with pytest.raises(RequestFailedError, match="not finite"):
            await collect(llm, [POISON, 1], SamplingParams(n=2))
        with pytest.raises(RequestFailedError, match="does not take such prompts"):
            await collect(llm, [REFUSED], SamplingParams())
        assert (
            text(await collect(llm, "x", SamplingParams(max_tokens=2, output_kind=DELTA))) == "xx"
        )
        await until(lambda: (s := llm.stats()) is not None and s.num_running == 0)

    run(body, fake_worker, settings())


def test_thousand_cancels_leave_nothing_running(fake_worker: str, settings: Settings) -> None:
    async def one(llm: AsyncLLM, index: int) -> None:
        outputs = llm.generate("abc", SamplingParams(max_tokens=10_000))
        if index % 3 == 0:
            async for _ in outputs:
                break
            await outputs.aclose()
            return
        task = asyncio.create_task(anext(outputs))
        await asyncio.sleep(0.001 * (index % 7))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await outputs.aclose()

    async def body(llm: AsyncLLM) -> None:
        for start in range(0, 1000, 50):
            await asyncio.gather(*(one(llm, i) for i in range(start, start + 50)))
        await until(lambda: (s := llm.stats()) is not None and s.num_running == 0)
        again = await collect(llm, "abc", SamplingParams(max_tokens=3, output_kind=DELTA))
        assert text(again) == "abc"

    run(body, fake_worker, settings(max_model_len=20_000))


def test_abort_ends_the_iterator(fake_worker: str, settings: Settings) -> None:
    async def body(llm: AsyncLLM) -> None:
        task = asyncio.create_task(
            collect(llm, "ab", SamplingParams(n=2, max_tokens=None), request_id="r")
        )
        await asyncio.sleep(0.1)
        with pytest.raises(InvalidRequestError, match="already running"):
            await collect(llm, "ab", SamplingParams(), request_id="r")
        await llm.abort("r")
        await llm.abort("unknown")
        last = (await task)[-1]
        assert last.finished and {c.finish_reason for c in last.outputs} == {"abort"}
        await until(lambda: (s := llm.stats()) is not None and s.num_running == 0)

    run(body, fake_worker, settings(max_model_len=100_000))


def test_the_engine_hears_the_salt(
    fake_worker: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(llm: AsyncLLM) -> None:
        sent: list[Any] = []
        send = llm.engine.send
        monkeypatch.setattr(
            llm.engine, "send", lambda message: (sent.append(message), send(message))
        )
        await collect(llm, "ab", SamplingParams(n=2, max_tokens=1), cache_salt="s")
        await collect(llm, "ab", SamplingParams(max_tokens=1))
        assert [message.cache_salt for message in sent] == ["s", "s", ""]

    run(body, fake_worker, settings())


def test_slow_reader_gets_merged_deltas(fake_worker: str, settings: Settings) -> None:
    async def body(llm: AsyncLLM) -> None:
        outputs: list[RequestOutput] = []
        params = SamplingParams(max_tokens=200, output_kind=DELTA)
        async for output in llm.generate("abcd", params):
            outputs.append(output)
            await asyncio.sleep(0.1)
        assert text(outputs) == "abcd" * 50
        assert len(outputs) < 50

    run(body, fake_worker, settings())


def test_killed_engine_is_noticed_and_restarted(fake_worker: str, settings: Settings) -> None:
    async def body(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=None)
        waiting = [asyncio.create_task(collect(llm, "ab", params)) for _ in range(5)]
        await asyncio.sleep(0.2)
        first = llm.engine.pid
        assert first is not None
        killed = time.monotonic()
        os.kill(first, signal.SIGKILL)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert time.monotonic() - killed < 10.0
        assert all(isinstance(r, EngineDeadError) and "SIGKILL" in r.message for r in results)
        assert not llm.ready
        with pytest.raises(EngineDeadError):
            await collect(llm, "ab", SamplingParams())
        await until(lambda: llm.ready)
        assert llm.engine.pid != first and llm.engine.generation == 2
        again = await collect(llm, "ab", SamplingParams(max_tokens=2, output_kind=DELTA))
        assert text(again) == "ab"

    run(body, fake_worker, settings(max_model_len=1_000_000))


def test_what_killed_the_engine_twice_is_not_run_again(
    fake_worker: str, settings: Settings
) -> None:
    async def body(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=2, output_kind=DELTA)
        for generation in (1, 2):
            await until(
                lambda generation=generation: llm.ready and llm.engine.generation == generation
            )
            company = asyncio.create_task(collect(llm, "ab", SamplingParams(max_tokens=1000)))
            await asyncio.sleep(0.05)
            with pytest.raises(EngineDeadError, match="exit code 9"):
                await collect(llm, [DEADLY, 1], params)
            with pytest.raises(EngineDeadError):
                await company
            if generation == 1:
                await until(lambda: llm.ready)
                await collect(llm, "ab", SamplingParams(max_tokens=1000))  # now it is not suspect
        await until(lambda: llm.ready)
        with pytest.raises(RequestFailedError, match="died 2 times"):
            await collect(llm, [DEADLY, 1], params)
        assert llm.ready and llm.engine.generation == 3
        await collect(llm, "ab", SamplingParams(max_tokens=1000))

    run(body, fake_worker, settings(max_model_len=1_000_000))


def test_a_hung_engine_is_told_of_and_replaced(fake_worker: str, settings: Settings) -> None:
    async def body(llm: AsyncLLM) -> None:
        waiting = [
            asyncio.create_task(collect(llm, "ab", SamplingParams(max_tokens=None)))
            for _ in range(5)
        ]
        await asyncio.sleep(0.2)
        started = time.monotonic()
        waiting.append(asyncio.create_task(collect(llm, [BLOCKING], SamplingParams())))
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert time.monotonic() - started < 0.5 + 10.0
        assert all(isinstance(r, EngineDeadError) and "no progress" in r.message for r in results)
        await until(lambda: llm.ready)
        assert (
            text(await collect(llm, "x", SamplingParams(max_tokens=2, output_kind=DELTA))) == "xx"
        )

    run(body, fake_worker, settings(max_model_len=1_000_000, step_timeout=0.5))


def test_shutdown_tells_waiting_requests(fake_worker: str, settings: Settings) -> None:
    async def main() -> None:
        llm = await AsyncLLM(worker_module=fake_worker, **settings(max_model_len=100_000)).start()
        task = asyncio.create_task(collect(llm, "ab", SamplingParams(max_tokens=None)))
        await asyncio.sleep(0.1)
        await llm.shutdown()
        with pytest.raises(EngineDeadError, match="shutting down"):
            await task
        with pytest.raises(EngineDeadError):
            await collect(llm, "ab", SamplingParams())
        await llm.shutdown()

    asyncio.run(main())
