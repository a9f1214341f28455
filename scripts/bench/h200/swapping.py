"""KV blocks of 8,192 tokens to the host's memory and back, beside what the link can do, and beside
computing these tokens again. Figures in seconds, bytes and bytes a second.

``bytes_per_second_both_ways``, bytes over the seconds out and in, is what ``_LINK_BYTES_PER_S`` in
``jaxllm/runner/planning.py`` is to be.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.attention.kv_cache import bytes_per_block
from jaxllm.config.plan import EnginePlan
from scripts.bench.h200.part import Part, main
from scripts.bench.h200.settings import shared

REPEATS = 5
LINK_BYTES = 2**28


def measure(part: Part) -> dict[str, Any]:
    fields = shared(part.tiny, part.work)
    fields["swap_space"] = 0.25 if part.tiny else 4.0
    llm = LLM(**fields)
    plan = llm.plan
    tokens = 256 if part.tiny else 8192
    count = tokens // plan.block_size
    moved = count * _block_bytes(plan)
    runner: Any = llm.core.executor
    blocks = list(range(1, count + 1))

    def out() -> None:
        runner.move_blocks([(block, block) for block in blocks], (), (), {})
        runner.wait()

    def back() -> None:
        runner.move_blocks((), (), [(block, block) for block in blocks], {})
        runner.wait()

    random = np.random.RandomState(0)
    answer = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)

    def compute() -> None:
        prompt = random.randint(1000, 40_000, size=tokens).tolist()
        llm.generate([prompt], answer, use_tqdm=False)

    seconds = {name: _seconds(f) for name, f in (("out", out), ("in", back), ("compute", compute))}
    link = _link(LINK_BYTES // 64 if part.tiny else LINK_BYTES)
    llm.shutdown()
    both = seconds["out"] + seconds["in"]
    return {
        "tokens": tokens,
        "bytes": moved,
        "seconds": seconds,
        "bytes_per_second": {name: moved / seconds[name] for name in ("out", "in")},
        "link_bytes_per_second": link,
        "of_link": {name: moved / seconds[name] / link[name] for name in ("out", "in")},
        "bytes_per_second_both_ways": moved / both,
        "computed_again_over_swapped": seconds["compute"] / both,
    }


def _block_bytes(plan: EnginePlan) -> int:
    return bytes_per_block(plan.model, plan.block_size, plan.page_dtype, plan.cache_head_dims)


def _seconds(work: Callable[[], object]) -> float:
    """Median; the first time does not count."""
    found: list[float] = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return median(found[1:])


def _link(size: int) -> dict[str, float]:
    """The most that one array of ``size`` bytes gets, to locked memory of the host and back."""
    device = jax.devices()[0]
    here = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    there = jax.sharding.SingleDeviceSharding(device)
    on_device = jax.device_put(jnp.zeros(size, jnp.int8), there)
    on_host = jax.block_until_ready(jax.device_put(on_device, here))
    out = _seconds(lambda: jax.block_until_ready(jax.device_put(on_device, here)))
    back = _seconds(lambda: jax.block_until_ready(jax.device_put(on_host, there)))
    return {"out": size / out, "in": size / back}


if __name__ == "__main__":
    main(measure)
