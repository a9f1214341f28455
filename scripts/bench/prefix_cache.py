"""What computing a prefix once saves: the engine with prefix caching and swapping, and without.

    prefix_cache.py [--only NAME ...] [--full] [--repeats 5] [--model DIR] [--settings JSON]
        [--json FILE]

"conversations": each talks turn by turn, all at once, behind one system prompt; hit rate and time
to the first token with caching and without. "idle": one request alone whose prompt but for the
last tokens is cached, beside one of which nothing is. "offloaded": the same where what is cached
has made way to the host's memory, or lies in files since the engine before. "unshared": prompts
with nothing in common, where caching can only cost. "swap": a cache for a part of the requests that
run; what was preempted is loaded from the host's memory, or computed again. "urgent": long requests
must make way, whole, for better priorities; what they lost is loaded, or computed again.

Each pair of engines takes turns, so that other load meets both; ratios are medians over the turns.
Sizes are a CPU's; --full is for an accelerator. Each measurement starts engines of the size it
needs; --settings has EngineConfig fields that all get instead, so that one compilation serves all.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxllm import AsyncLLM, SamplingParams  # noqa: E402
from jaxllm.bench.report import check_writable, make_client_report, write_report  # noqa: E402
from jaxllm.bench.workload import Workload, workload_b  # noqa: E402
from jaxllm.errors import RequestFailedError  # noqa: E402

BLOCK_SIZE = 64
STATS_AGE_S = 1.5  # an engine's figures are about a second old


@dataclass(frozen=True)
class Sizes:
    """Tokens, unless said otherwise."""

    conversations: int = 4  # number
    turns: int = 4  # number
    shared: int = 256  # system prompt
    question: int = 24
    answer: int = 16
    cached: int = 1024
    new: int = 64
    requests: int = 8  # number: unshared, swap
    longest: int = 64  # unshared: prompts and answers are cut
    swap_prompt: int = 192
    swap_answer: int = 72
    swap_holds: int = 3  # number of whole requests that the small cache holds
    urgent_prompt: int = 448
    urgent_answer: int = 64
    urgent_low: int = 6  # number of requests that run already; all but one fill the cache
    urgent_high: int = 4  # number of those that must not wait


FULL = Sizes(
    conversations=32,
    turns=8,
    shared=1024,
    question=64,
    answer=64,
    cached=4096,
    requests=256,
    longest=1024,
    swap_prompt=1024,
    swap_answer=256,
    swap_holds=64,
    urgent_prompt=8000,
    urgent_answer=192,
    urgent_low=16,
    urgent_high=12,
)


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    ttft: float  # seconds
    num_cached: int


async def ask(
    llm: AsyncLLM,
    prompt: list[int],
    length: int,
    *,
    priority: int = 0,
    begun: asyncio.Event | None = None,
) -> Answer:
    """``begun`` is set with the first token."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length)
    last = None
    async for output in llm.generate(prompt, params, priority=priority):
        last = output
        if begun is not None:
            begun.set()
    if last is None or last.error or len(last.outputs[0].token_ids) != length:
        raise RequestFailedError(f"A request of the benchmark failed: {last and last.error}")
    if last.metrics is None or last.metrics.first_token_latency is None:
        raise RequestFailedError("A request of the benchmark was not timed.")
    ttft = last.metrics.first_token_latency
    return Answer(list(last.outputs[0].token_ids), ttft, last.num_cached_tokens)


class Bench:
    """Starts engines and draws prompts that were never drawn before."""

    def __init__(self, model: str, sizes: Sizes, repeats: int, settings: dict[str, Any]):
        self.model, self.sizes, self.repeats, self.settings = model, sizes, repeats, settings
        self._random = np.random.RandomState(0)

    def engine(self, seqs: int, length: int, *, blocks: int | None = None, **more: Any) -> AsyncLLM:
        """For ``seqs`` requests of ``length`` tokens at once."""
        each = -(-length // BLOCK_SIZE)
        own = {
            "model": self.model,
            "max_num_seqs": seqs,
            "max_model_len": each * BLOCK_SIZE,
            "num_gpu_blocks_override": blocks or seqs * each + 1,
            "block_size": BLOCK_SIZE,
        }
        return AsyncLLM(**(own | more | self.settings))

    def draw(self, length: int) -> list[int]:
        return self._random.randint(1000, 40000, size=length).tolist()

    async def turns(
        self, name: str, measures: Mapping[str, Callable[[], Awaitable[float]]]
    ) -> dict[str, list[float]]:
        """Each measure once per repeat, in turns; the first round does not count."""
        found: dict[str, list[float]] = {key: [] for key in measures}
        for repeat in tqdm(range(self.repeats + 1), desc=name):
            order = list(measures.items())
            for key, measure in order if repeat % 2 else order[::-1]:
                value = await measure()
                if repeat:
                    found[key].append(value)
        return found


async def conversations(bench: Bench) -> dict[str, Any]:
    sizes = bench.sizes
    turn = sizes.question + sizes.answer
    length = sizes.shared + sizes.turns * turn
    figures: dict[str, Any] = {}
    system = bench.draw(sizes.shared)
    asked = [[bench.draw(sizes.question) for _ in range(sizes.turns)]
             for _ in range(sizes.conversations)]  # fmt: skip

    async def talk(llm: AsyncLLM, questions: list[list[int]], bar: Any) -> list[tuple[int, Answer]]:
        prompt, told = list(system), []
        for question in questions:
            prompt += question
            answer = await ask(llm, prompt, sizes.answer)
            told.append((len(prompt), answer))
            prompt += answer.token_ids
            bar.update()
        return told

    for caching in (False, True):
        async with bench.engine(sizes.conversations, length, enable_prefix_caching=caching) as llm:
            await ask(llm, bench.draw(sizes.shared), 2)
            name = "conversations, " + ("cached" if caching else "not cached")
            with tqdm(total=sizes.conversations * sizes.turns, desc=name) as bar:
                began = time.perf_counter()
                told = await asyncio.gather(*(talk(llm, item, bar) for item in asked))
                seconds = time.perf_counter() - began
        answers = [item for conversation in told for item in conversation]
        ttfts = [answer.ttft * 1000 for _, answer in answers]
        num_cached = sum(answer.num_cached for _, answer in answers)
        figures["on" if caching else "off"] = {
            "hit_rate": round(num_cached / sum(prompt for prompt, _ in answers), 4),
            "ttft_ms_median": round(statistics.median(ttfts), 1),
            "ttft_ms_p90": round(float(np.quantile(ttfts, 0.9)), 1),
            "seconds": round(seconds, 2),
        }
    on, off = figures["on"], figures["off"]
    figures["ttft_off_over_on"] = round(off["ttft_ms_median"] / on["ttft_ms_median"], 2)
    figures["seconds_off_over_on"] = round(off["seconds"] / on["seconds"], 2)
    return figures


async def idle(bench: Bench) -> dict[str, Any]:
    sizes = bench.sizes
    length = sizes.cached + sizes.new
    async with bench.engine(2, length + 1) as llm:

        async def hit() -> float:
            known = bench.draw(sizes.cached)
            await ask(llm, known, 1)
            return await ttft_of_hit(llm, known, bench)

        async def miss() -> float:
            return (await ask(llm, bench.draw(length), 1)).ttft

        return compared(await bench.turns("idle", {"hit": hit, "miss": miss}), "ms", 1000)


async def offloaded(bench: Bench) -> dict[str, Any]:
    sizes = bench.sizes
    length = sizes.cached + sizes.new
    with TemporaryDirectory() as folder:
        start = partial(bench.engine, 1, length + 1, kv_offloading_size=1.0)
        kept = [bench.draw(sizes.cached) for _ in range(bench.repeats + 1)]
        async with start(kv_offloading_dir=folder) as llm:
            for known in kept:
                await ask(llm, known, 1)
        async with start(kv_offloading_dir=folder) as llm:

            async def miss() -> float:
                return (await ask(llm, bench.draw(length), 1)).ttft

            async def host() -> float:
                known = bench.draw(sizes.cached)
                await ask(llm, known, 1)
                await miss()  # takes the device's blocks
                return await ttft_of_hit(llm, known, bench)

            async def files() -> float:
                return await ttft_of_hit(llm, kept.pop(), bench)

            measures = {"host": host, "files": files, "miss": miss}
            return compared(await bench.turns("offloaded", measures), "ms", 1000)


async def ttft_of_hit(llm: AsyncLLM, known: list[int], bench: Bench) -> float:
    """Of a prompt that goes on where ``known`` ends."""
    answer = await ask(llm, known + bench.draw(bench.sizes.new), 1)
    if answer.num_cached < len(known):
        raise RequestFailedError(f"Only {answer.num_cached} tokens were cached.")
    return answer.ttft


async def unshared(bench: Bench) -> dict[str, Any]:
    sizes = bench.sizes
    work = workload_b(sizes.requests)
    lens = [min(n, sizes.longest) for n in work.output_lens]

    async def run(llm: AsyncLLM) -> float:
        """Other tokens in each run, so that nothing is shared with the run before."""
        prompts = [bench.draw(min(len(prompt), sizes.longest)) for prompt in work.prompts]
        return await whole(llm, Workload("unshared", prompts, lens))

    seqs = min(sizes.requests, 64)
    async with AsyncExitStack() as stack:
        start = partial(bench.engine, seqs, 2 * sizes.longest)
        on = await stack.enter_async_context(start())
        off = await stack.enter_async_context(start(enable_prefix_caching=False))
        measures = {"on": partial(run, on), "off": partial(run, off)}
        return compared(await bench.turns("unshared", measures), "seconds", 1)


async def swap(bench: Bench) -> dict[str, Any]:
    sizes = bench.sizes
    length = sizes.swap_prompt + sizes.swap_answer
    blocks = sizes.swap_holds * -(-length // BLOCK_SIZE) + 1

    async def run(llm: AsyncLLM) -> float:
        prompts = [bench.draw(sizes.swap_prompt) for _ in range(sizes.requests)]
        return await whole(llm, Workload("swap", prompts, [sizes.swap_answer] * len(prompts)))

    async with AsyncExitStack() as stack:
        start = partial(bench.engine, sizes.requests, length, blocks=blocks)
        swapped = await stack.enter_async_context(start(swap_space=4.0))
        computed = await stack.enter_async_context(start(swap_space=0.0))
        bare = await stack.enter_async_context(start(swap_space=0.0, enable_prefix_caching=False))
        engines = {"swapped": swapped, "computed_again": computed, "computed_all_again": bare}
        measures = {name: partial(run, llm) for name, llm in engines.items()}
        figures = compared(await bench.turns("swap", measures), "seconds", 1)
        await asyncio.sleep(STATS_AGE_S)
        for name, llm in engines.items():
            stats = llm.stats()
            if stats is not None:
                figures[f"{name}_preemptions"] = stats.num_preemptions
                figures[f"{name}_blocks_loaded"] = stats.num_blocks_loaded
        return figures


async def urgent(bench: Bench) -> dict[str, Any]:
    sizes = bench.sizes
    length = sizes.urgent_prompt + sizes.urgent_answer
    blocks = (sizes.urgent_low + 1) * -(-length // BLOCK_SIZE) + 1

    async def run(llm: AsyncLLM, preempted: list[int]) -> float:
        """Seconds from the first urgent request to the end of all."""
        await asyncio.sleep(STATS_AGE_S)
        before = num_preemptions(llm)

        async def low(begun: asyncio.Event) -> None:
            prompt = bench.draw(sizes.urgent_prompt)
            await ask(llm, prompt, sizes.urgent_answer, priority=1, begun=begun)

        begun = [asyncio.Event() for _ in range(sizes.urgent_low)]
        running = [asyncio.create_task(low(event)) for event in begun]
        await asyncio.gather(*(event.wait() for event in begun))
        began = time.perf_counter()
        high = [bench.draw(sizes.urgent_prompt) for _ in range(sizes.urgent_high)]
        answer = sizes.urgent_answer // 4  # long enough to be there together
        await asyncio.gather(*(ask(llm, prompt, answer) for prompt in high), *running)
        seconds = time.perf_counter() - began
        await asyncio.sleep(STATS_AGE_S)
        preempted.append(num_preemptions(llm) - before)
        return seconds

    async with AsyncExitStack() as stack:
        more: dict[str, Any] = {"blocks": blocks, "scheduling_policy": "priority"}
        start = partial(bench.engine, sizes.urgent_low + sizes.urgent_high, length, **more)
        gib = 16.0 if sizes is FULL else 1.0
        swapped = await stack.enter_async_context(start(swap_space=gib))
        computed = await stack.enter_async_context(start(swap_space=0.0))
        engines = {"swapped": swapped, "computed_again": computed}
        preempted: dict[str, list[int]] = {name: [] for name in engines}
        measures = {name: partial(run, llm, preempted[name]) for name, llm in engines.items()}
        figures = compared(await bench.turns("urgent", measures), "seconds", 1)
        for name, llm in engines.items():
            figures[f"{name}_preemptions_each"] = preempted[name]
            if (stats := llm.stats()) is not None:
                figures[f"{name}_blocks_loaded"] = stats.num_blocks_loaded
        return figures


def num_preemptions(llm: AsyncLLM) -> int:
    stats = llm.stats()
    return 0 if stats is None else stats.num_preemptions


async def whole(llm: AsyncLLM, work: Workload) -> float:
    """Seconds until the last request of the workload has ended."""
    began = time.perf_counter()
    pairs = zip(work.prompts, work.output_lens, strict=True)
    await asyncio.gather(*(ask(llm, prompt, length) for prompt, length in pairs))
    return time.perf_counter() - began


def compared(found: dict[str, list[float]], unit: str, scale: float) -> dict[str, Any]:
    """Medians, and of each but the first its ratio to the first: the median over the turns."""
    figures: dict[str, Any] = {
        f"{name}_{unit}": round(statistics.median(values) * scale, 3)
        for name, values in found.items()
    }
    first, *others = found
    for name in others:
        ratios = [a / b for a, b in zip(found[name], found[first], strict=True)]
        figures[f"{name}_over_{first}"] = round(statistics.median(ratios), 3)
        figures[f"{name}_over_{first}_all"] = [round(ratio, 3) for ratio in ratios]
    return figures


PARTS = {part.__name__: part for part in (conversations, idle, offloaded, unshared, swap, urgent)}


async def run(args: argparse.Namespace) -> None:
    """The results are written after each part."""
    sizes = FULL if args.full else Sizes()
    bench = Bench(args.model, sizes, args.repeats, args.settings)
    figures: dict[str, Any] = {"benchmark": "prefix_cache", "model": args.model}
    figures |= {"sizes": asdict(sizes), "repeats": args.repeats, "settings": args.settings}
    for name in args.only or PARTS:
        before = os.getloadavg()[0]
        part = await PARTS[name](bench)
        figures[name] = {**part, "load_average_before": round(before, 2)}
        print(f"{name}:", "  ".join(f"{k} {v}" for k, v in figures[name].items()), flush=True)
        report = make_client_report(figures)
        report["command"] = [Path(__file__).name, *sys.argv[1:]]
        write_report(report, args.json)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--full", action="store_true", help="an accelerator's sizes")
    parser.add_argument("--repeats", type=int, default=5, help="of all but conversations")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    check_writable(args.json)
    asyncio.run(run(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
