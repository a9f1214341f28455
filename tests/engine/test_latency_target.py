"""Steps that stay within a target: what is learnt from their times, and what then is scheduled."""

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest

from jaxllm.config.plan import BatchBucket, BatchKind
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.engine_core import EngineCore
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.engine.latency_target import LatencyTarget
from tests.fakes.plans import make_plan, make_request

SIZES = (256, 512, 1024, 2048)
BUCKETS = [BatchBucket(size, 64, BatchKind.MIXED) for size in SIZES]


def seconds(num_tokens: int) -> float:
    """As a step costs on a GPU: weights are read, then each token is computed."""
    return 0.006 + num_tokens * 20e-6


def learn(target: LatencyTarget, cost: Callable[[int], float], num_steps: int) -> list[int]:
    """Limits chosen while every step takes as many tokens as it may."""
    limits = []
    for _ in range(num_steps):
        limits.append(target.token_limit)
        bucket = next(b for b in BUCKETS if b.num_tokens == limits[-1])
        target.observe(bucket, cost(bucket.num_tokens))
    return limits


@pytest.mark.parametrize(
    ("target_ms", "expected"), [(1.0, 256), (14.0, 256), (19.0, 512), (30.0, 1024), (99.0, 2048)]
)
def test_it_finds_the_largest_program_in_time(target_ms: float, expected: int):
    limits = learn(LatencyTarget(BUCKETS, target_ms / 1000), seconds, 20)
    assert limits[0] == 256  # nothing is known: the smallest first
    assert limits[-1] == expected
    assert sum(limit > expected for limit in limits) <= 1, "what is late is not tried again soon"


def test_decode_steps_teach_nothing_of_mixed_ones():
    target = LatencyTarget(BUCKETS, 0.03)
    target.observe(BatchBucket(64, 64, BatchKind.DECODE), 1.0)
    assert target.token_limit == 256
    target.observe(BUCKETS[0], 0.001)
    assert target.token_limit == 512


def test_one_slow_step_does_not_count_for_long():
    target = LatencyTarget(BUCKETS, 0.03)
    learn(target, seconds, 50)
    target.observe(BUCKETS[2], 5.0)
    assert set(learn(target, seconds, 60)) == {1024}


def test_it_follows_when_steps_become_slower_and_faster_again():
    target = LatencyTarget(BUCKETS, 0.03)
    assert learn(target, seconds, 50)[-1] == 1024
    assert learn(target, lambda n: 1.5 * seconds(n), 50)[-1] == 512
    late = learn(target, lambda n: 1.5 * seconds(n), 2000).count(1024)
    assert 1 <= late <= 4, "what was late is tried again, seldom"
    assert learn(target, seconds, 600)[-1] == 1024


# Of one H200 beside 64 rows that decode: seconds of the mixed programs, and of each token that the
# chunk's prompt has in the cache.
MEASURED = {128: 0.0087, 256: 0.0111, 512: 0.0195, 1024: 0.0261}
PER_CACHED = 0.41e-6


def test_prompts_are_fed_in_larger_programs_where_their_contexts_are_short():
    target = LatencyTarget([BatchBucket(n, 64, BatchKind.MIXED) for n in MEASURED], 1.8 * 0.00715)
    random, fed, took = Random(3), [list[int]() for _ in range(8)], list[float]()
    for sizes in fed:
        cached = 0
        while cached < 8192:
            size = target.token_limit
            took.append(random.gauss(1.0, 0.02) * (MEASURED[size] + PER_CACHED * cached))
            target.observe(BatchBucket(size, 64, BatchKind.MIXED), took[-1])
            sizes.append(size)
            cached += size - 64
    assert np.quantile(took, 0.99) <= 1.1 * target.target_s
    for sizes in fed[1:]:
        assert sizes.count(256) > 10, "all prompts begin with short contexts"
        assert sizes.count(128) > 30
        assert sizes.count(512) + sizes.count(1024) <= 1


class TimedDevice:
    """An executor and its clock: steps take what their programs cost, one after the other."""

    def __init__(self, cost: Callable[[BatchBucket], float]):
        self.cost = cost
        self.time = 1.0
        self.free_at = 0.0
        self.steps: list[tuple[SchedulerOutput, float]] = []  # with its end

    def now(self) -> float:
        return self.time

    def dispatch(self, plan: SchedulerOutput) -> tuple[SchedulerOutput, float]:
        self.free_at = max(self.free_at, self.time) + self.cost(plan.bucket)
        self.steps.append((plan, self.free_at))
        return self.steps[-1]

    def fetch(self, handle: Any) -> ModelRunnerOutput:
        step, end = handle
        self.time = max(self.time, end)
        n = step.rows.size
        return ModelRunnerOutput(step.step_id, np.full(n, 9, np.int32), np.full(n, True))

    def reset(self) -> None:
        raise AssertionError("no step fails here")


def mixed_load(target_s: float | None, async_scheduling: bool) -> tuple[np.ndarray, float, float]:
    """Times between tokens of 48 requests that decode beside a stream of prompts of 8,000 tokens:
    in seconds, with prefill tokens per second, and seconds of a step that only decodes.
    """
    plan = make_plan(
        max_model_len=8192,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        block_size=64,
        num_blocks=4000,
    )
    random = Random(7)
    device = TimedDevice(lambda b: seconds(b.num_tokens) * random.uniform(0.95, 1.05))
    target = None if target_s is None else LatencyTarget(plan.buckets, target_s)
    core = EngineCore(
        Scheduler(plan),
        device,
        async_scheduling=async_scheduling,
        latency_target=target,
        clock=device,
    )
    for i in range(48):
        core.add_request(make_request(f"d{i}", 20, 2000))
    core.step()
    for i in range(400):
        if len(core.scheduler.waiting) < 2:
            core.add_request(make_request(f"p{i}", 8000, 1))
        core.step()
    steps = device.steps[2:]
    assert all(step.num_decode_rows >= 48 for step, _ in steps)
    gaps = np.diff([end for _, end in steps])
    prefilled = sum(step.num_tokens - step.num_decode_rows for step, _ in steps[1:])
    return gaps, prefilled / gaps.sum(), seconds(64)


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_tokens_come_in_time_beside_long_prefills(async_scheduling: bool):
    free, fast, decode_s = mixed_load(None, async_scheduling)
    gaps, held, _ = mixed_load(2 * decode_s, async_scheduling)
    p99 = float(np.quantile(gaps, 0.99))
    print(f"p99 {p99 * 1e3:.1f} ms, decode {decode_s * 1e3:.1f} ms, {held:.0f} of {fast:.0f} tok/s")
    assert p99 <= 2 * decode_s
    assert np.quantile(free, 0.99) > 4 * decode_s, "without a target it would be late"
    in_time = [2**i for i in range(3, 12) if 1.05 * seconds(2**i) <= 2 * decode_s]
    assert held > 0.9 * max((size - 48) / seconds(size) for size in in_time)
