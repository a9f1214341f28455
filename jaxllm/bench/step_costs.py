"""What steps cost, over a small grid: rows and context of decode steps, tokens of prefills.

The table is what ``scripts/simulate.py --trace ... --cost REPORT`` predicts with.
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from jaxllm.bench.throughput import measure
from jaxllm.bench.workload import workload_random
from jaxllm.config.plan import BatchBucket, BatchKind
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.llm import LLM
from jaxllm.simulation.cost import CostTable, ProgramCost, num_attended

DECODE_STEPS = 8  # of each number of rows and context
Seen = tuple[BatchBucket, int, float]  # program, tokens attended to, seconds


class StepTimer:
    """An executor that notes how long each step took: since the end of the step before, or its own
    dispatch, to its results.
    """

    def __init__(self, executor: Any):
        self.executor = executor
        self._fetched = 0.0
        self.seen: list[Seen] = []

    def dispatch(self, plan: SchedulerOutput) -> tuple[SchedulerOutput, float, Any]:
        return plan, time.perf_counter(), self.executor.dispatch(plan)

    def fetch(self, handle: tuple[SchedulerOutput, float, Any]) -> ModelRunnerOutput:
        step, dispatched, inner = handle
        output = self.executor.fetch(inner)
        began, self._fetched = max(dispatched, self._fetched), time.perf_counter()
        self.seen.append((step.bucket, num_attended(step), self._fetched - began))
        return output

    def reset(self) -> None:
        self.executor.reset()


def measure_costs(llm: LLM, longest: int) -> CostTable:
    """Requests of up to ``longest`` tokens; their prompts have nothing in common."""
    plan, core = llm.plan, llm.core
    timer = StepTimer(core.executor)
    core.executor = timer
    try:
        for seed, (rows, length) in enumerate(_grid(llm, longest)):
            work = workload_random(rows, length, 1 + DECODE_STEPS, seed)
            measure(llm, work.folded(llm.info.vocab_size))
    finally:
        core.executor = timer.executor
    return CostTable(plan, tuple(_programs(timer.seen)), core.async_scheduling, llm.info.model)


def _grid(llm: LLM, longest: int) -> list[tuple[int, int]]:
    """(rows, tokens of each prompt): every decode program with short and long contexts, and prompts
    that fill every mixed program.
    """
    plan = llm.plan
    most = min(longest, llm.info.max_model_len) - DECODE_STEPS - 1
    decode = [b.num_rows for b in plan.buckets if b.kind is BatchKind.DECODE]
    mixed = [b.num_tokens for b in plan.buckets if b.kind is BatchKind.MIXED]
    lengths = sorted({min(16, most), most})
    grid = [(rows, length) for rows in decode for length in lengths if _fits(llm, rows, length)]
    return grid + [(1, min(tokens, most)) for tokens in mixed for _ in range(2)]


def _fits(llm: LLM, rows: int, length: int) -> bool:
    """Without preemptions."""
    size = llm.plan.block_size
    return rows * -(-(length + DECODE_STEPS + 1) // size) < llm.plan.num_blocks


def _programs(seen: Iterable[Seen]) -> list[ProgramCost]:
    """A point for steps that attend to few tokens and one for those that attend to many, by
    program; the first step of each, which may load it, does not count.
    """
    by_bucket: dict[BatchBucket, list[tuple[int, float]]] = defaultdict(list)
    for bucket, attended, seconds in seen:
        by_bucket[bucket].append((attended, seconds))
    programs: list[ProgramCost] = []
    for bucket, points in sorted(by_bucket.items()):
        counted = points[1:] or points
        middle = (min(counted)[0] + max(counted)[0]) / 2
        for part in ([p for p in counted if p[0] <= middle], [p for p in counted if p[0] > middle]):
            if part:
                attended, seconds = (fmean(column) for column in zip(*part, strict=True))
                programs.append(ProgramCost(bucket, seconds, len(part), attended))
    return programs
