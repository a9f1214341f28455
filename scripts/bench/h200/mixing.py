"""64 streams, and what becomes of their rhythm while long prompts are computed beside them, without
``--target-itl-ms`` and with it at 1.8 times the step of decoding alone.

``decode``: nobody else. ``arriving``: two prompts of 8,192 tokens under way at all times.
``long``: one prompt of 32,768. The time between a stream's tokens is what its consumer sees.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm import AsyncLLM, SamplingParams
from jaxllm.errors import RequestFailedError
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import RequestOutputKind
from scripts.bench.h200.part import Part, main
from scripts.bench.h200.settings import engine

OF_DECODING_ALONE = 1.8


@dataclass(frozen=True)
class Sizes:
    streams: int = 64
    context: int = 1024  # tokens of a stream's prompt
    arriving: int = 8192
    long: int = 32_768
    decode_seconds: float = 3.0
    arriving_seconds: float = 8.0
    in_flight: int = 2


TINY = Sizes(4, 16, 128, 256, 0.5, 1.0)


@dataclass
class Streams:
    """Requests that go on until they are cancelled; when each of their chunks came."""

    llm: AsyncLLM
    sizes: Sizes
    draw: Callable[[int], list[int]]
    chunks: dict[int, list[float]] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        self.tasks = [asyncio.create_task(self._read(i)) for i in range(self.sizes.streams)]
        while len(self.chunks) < self.sizes.streams:
            await asyncio.sleep(0.05)
            self.check()

    async def _read(self, stream: int) -> None:
        room = self.llm.info.max_model_len - self.sizes.context
        async for _ in _answer(self.llm, self.draw(self.sizes.context), min(room, 8192)):
            self.chunks.setdefault(stream, []).append(time.perf_counter())

    def check(self) -> None:
        if any(task.done() for task in self.tasks):
            raise RequestFailedError("A stream ended before the measurement.")

    def rhythm(self, begin: float, end: float) -> dict[str, float]:
        """Milliseconds between chunks that came in this time."""
        self.check()
        gaps = np.concatenate([
            np.diff([moment for moment in chunks if begin <= moment <= end])
            for chunks in self.chunks.values()
        ])  # fmt: skip
        p50, p99 = np.percentile(gaps, (50, 99)) * 1000
        return {
            "itl_ms_mean": float(gaps.mean() * 1000),
            "itl_ms_p50": float(p50),
            "itl_ms_p99": float(p99),
            "itl_ms_max": float(gaps.max() * 1000),
            "gaps": int(gaps.size),
            "seconds": end - begin,
        }

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def _answer(llm: AsyncLLM, prompt: list[int], length: int) -> AsyncGenerator[RequestOutput]:
    kind = RequestOutputKind.DELTA
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length, output_kind=kind)
    async for output in llm.generate(prompt, params):
        if output.error:
            raise RequestFailedError(output.error)
        yield output


async def prefill(llm: AsyncLLM, prompt: list[int]) -> float:
    """Seconds to the first token."""
    began = time.perf_counter()
    async for _ in _answer(llm, prompt, 1):
        pass
    return time.perf_counter() - began


async def watch(fields: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    random = np.random.RandomState(0)

    def draw(length: int) -> list[int]:
        return random.randint(1000, 100_000, size=length).tolist()

    async with AsyncLLM(**fields) as llm:
        streams = Streams(llm, sizes, draw)
        await streams.start()

        async def phase(work: Coroutine[Any, Any, Any]) -> tuple[dict[str, Any], Any]:
            began = time.perf_counter()
            result = await work
            return streams.rhythm(began, time.perf_counter()), result

        async def arriving() -> list[float]:
            until = time.perf_counter() + sizes.arriving_seconds
            seconds: list[float] = []

            async def one_after_the_other() -> None:
                while not seconds or time.perf_counter() < until:
                    seconds.append(await prefill(llm, draw(sizes.arriving)))

            await asyncio.gather(*(one_after_the_other() for _ in range(sizes.in_flight)))
            return seconds

        alone, _ = await phase(asyncio.sleep(sizes.decode_seconds))
        beside, ttfts = await phase(arriving())
        beside["prefill_tokens_per_second"] = len(ttfts) * sizes.arriving / beside["seconds"]
        beside["ttft_seconds_median"] = float(np.median(ttfts))
        beside["prompts"] = len(ttfts)
        long, ttft = await phase(prefill(llm, draw(sizes.long)))
        long["ttft_seconds"] = ttft
        await streams.stop()
    return {"decode": alone, "arriving": beside, "long": long}


def measure(part: Part) -> dict[str, Any]:
    sizes = TINY if part.tiny else Sizes()
    fields = engine(part.tiny, part.work)
    free = asyncio.run(watch(fields, sizes))
    target = OF_DECODING_ALONE * free["decode"]["itl_ms_p50"]
    kept = asyncio.run(watch(fields | {"target_itl_ms": target}, sizes))
    return {"target_itl_ms": target, "without": free, "with": kept}


if __name__ == "__main__":
    main(measure)
