"""What steps cost, over a small grid: rows and context of decode steps, tokens of prefills.

The table is what ``scripts/simulate.py --trace ... --cost REPORT`` predicts with.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxllm.bench.throughput import measure
from jaxllm.bench.workload import workload_random
from jaxllm.config.plan import BatchBucket, BatchKind
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.llm import LLM
from jaxllm.simulation.cost import CostTable, ProgramCost, SeenStep, work_of

DECODE_STEPS = 8  # of each number of rows and context, when all rows decode


class StepTimer:
    """An executor that notes how long each step took: since the end of the step before, or its own
    dispatch, to its results.
    """

    def __init__(self, executor: Any):
        self.executor = executor
        self._fetched = 0.0
        self._seen: list[SeenStep] = []

    def dispatch(self, plan: SchedulerOutput) -> tuple[SchedulerOutput, float, Any]:
        return plan, time.perf_counter(), self.executor.dispatch(plan)

    def fetch(self, handle: tuple[SchedulerOutput, float, Any]) -> ModelRunnerOutput:
        step, dispatched, inner = handle
        output = self.executor.fetch(inner)
        began, self._fetched = max(dispatched, self._fetched), time.perf_counter()
        work = work_of(step.starts, step.num_new_tokens)
        self._seen.append(SeenStep(step.bucket, work, self._fetched - began))
        return output

    def take(self) -> list[SeenStep]:
        """Steps since the last call."""
        seen, self._seen = self._seen, []
        return seen

    def reset(self) -> None:
        self.executor.reset()


class _Run(NamedTuple):
    rows: int
    prompt: int  # tokens of each
    answer: int


def measure_costs(llm: LLM, longest: int) -> CostTable:
    """Requests of up to ``longest`` tokens; their prompts have nothing in common."""
    plan, core = llm.plan, llm.core
    timer = StepTimer(core.executor)
    core.executor = timer
    programs: list[ProgramCost] = []
    known: set[BatchBucket] = set()
    try:
        for seed, run in enumerate(_grid(llm, longest)):
            work = workload_random(*run, seed)
            measure(llm, work.folded(llm.info.vocab_size))
            programs += _points(timer.take(), known)
    finally:
        core.executor = timer.executor
    return CostTable(plan, tuple(programs), core.async_scheduling, llm.info.model)


def _grid(llm: LLM, longest: int) -> list[_Run]:
    """Every decode program with short and long contexts, and prompts that fill every mixed one."""
    plan, most = llm.plan, min(longest, llm.info.max_model_len)
    decode = [b.num_rows for b in plan.buckets if b.kind is BatchKind.DECODE]
    mixed = [b.num_tokens for b in plan.buckets if b.kind is BatchKind.MIXED]
    runs = [_decode_run(llm, rows, length) for rows in decode for length in (16, most)]
    prompts = sorted({min(tokens, most - 1) for tokens in mixed})
    # In turns, so that another's load on the machine meets all of them.
    return [*dict.fromkeys(runs), *(_Run(1, n, 1) for _ in range(3) for n in prompts)]


def _decode_run(llm: LLM, rows: int, length: int) -> _Run:
    """Requests of about ``length`` tokens that all decode together in the end: the first ones do so
    already while the prompts of the last ones are computed. As long as the KV cache lets them be.
    """
    plan, room = llm.plan, llm.info.max_model_len
    each = (plan.num_blocks - 1) // rows * plan.block_size
    steps = -(-rows * length // plan.max_num_batched_tokens) + DECODE_STEPS
    prompt = max(min(length, room - steps, each - steps), 1)
    return _Run(rows, prompt, min(steps, room - prompt, max(each - prompt, 1)))


def _points(seen: Sequence[SeenStep], known: set[BatchBucket]) -> list[ProgramCost]:
    """For each program of a run the step that took the median time. The first step of a program,
    which may load it, does not count if there is another.
    """
    by_bucket: dict[BatchBucket, list[SeenStep]] = defaultdict(list)
    for step in seen:
        by_bucket[step.bucket].append(step)
    points: list[ProgramCost] = []
    for bucket, steps in sorted(by_bucket.items()):
        counted = steps if bucket in known else steps[1:]
        known.add(bucket)
        if counted:
            middle = sorted(counted, key=lambda step: step.seconds)[len(counted) // 2]
            points.append(ProgramCost(bucket, middle.seconds, len(counted), *middle.work))
    return points
