"""How fast a trace would be served: the real scheduler, in virtual time, at measured costs."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.engine_core import EngineCore
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.errors import InvalidRequestError
from jaxllm.messages import EngineCoreRequest
from jaxllm.sampling_params import SamplingParams
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.cost import CostTable, work_of
from jaxllm.simulation.step_times import StepTimes
from jaxllm.simulation.trace import Times, TraceRequest, percentile


@dataclass(frozen=True, slots=True)
class Prediction:
    """Times in seconds."""

    max_num_seqs: int
    seconds: float
    output_tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    num_refused: int = 0  # the KV cache, or max_model_len, is too small for them
    num_preemptions: int = 0


class CostExecutor:
    """A device that takes its time and computes nothing."""

    def __init__(self, costs: CostTable, clock: VirtualClock):
        self._times, self._clock = StepTimes(costs), clock
        self._free_at = 0.0

    def dispatch(self, plan: SchedulerOutput) -> tuple[SchedulerOutput, float]:
        begins = max(self._clock.now(), self._free_at)
        work = work_of(plan.starts, plan.num_new_tokens)
        self._free_at = begins + self._times.seconds(plan.bucket, work)
        return plan, self._free_at

    def fetch(self, handle: tuple[SchedulerOutput, float]) -> ModelRunnerOutput:
        step, done = handle
        self._clock.advance(max(0.0, done - self._clock.now()))
        n = step.rows.size
        slots = step.bucket.num_tokens
        return ModelRunnerOutput(
            step.step_id, np.zeros(n, np.int32), np.ones(n, bool), num_token_slots=slots
        )

    def reset(self) -> None:
        self._free_at = self._clock.now()


def summarise(times: Times, max_num_seqs: int, **counts: int) -> Prediction:
    first, gaps = times.first(), times.gaps()
    return Prediction(
        max_num_seqs,
        times.seconds,
        times.num_tokens / times.seconds if times.seconds else 0.0,
        percentile(first, 0.5),
        percentile(first, 0.99),
        percentile(gaps, 0.5),
        percentile(gaps, 0.99),
        **counts,
    )


def predict(plan: EnginePlan, costs: CostTable, trace: Iterable[TraceRequest]) -> Prediction:
    """Serve the trace; requests that the plan cannot hold are refused, and counted."""
    clock, times, refused = VirtualClock(), Times(), 0
    core = EngineCore(
        Scheduler(plan),
        CostExecutor(costs, clock),
        async_scheduling=costs.async_scheduling,
        clock=clock,
    )
    coming = deque(enumerate(trace))
    while coming or core.has_work():
        if coming and not core.has_work():
            clock.advance(max(0.0, coming[0][1].arrival - clock.now()))
        while coming and coming[0][1].arrival <= clock.now():
            number, request = coming.popleft()
            try:
                core.add_request(_request(number, request))
            except InvalidRequestError:
                refused += 1
                continue
            times.came(str(number), request.arrival)
        if core.has_work():
            outputs = core.step()
            times.told(outputs, clock.now())
    preemptions = core.scheduler.num_preemptions
    return summarise(times, plan.max_num_seqs, num_refused=refused, num_preemptions=preemptions)


def _request(number: int, request: TraceRequest) -> EngineCoreRequest:
    """A trace tells no texts: it is taken to have nothing in common with the others."""
    params = SamplingParams(seed=0, max_tokens=request.output, ignore_eos=True)
    return EngineCoreRequest(
        str(number), (0,) * request.prompt, params, request.output, cache_salt=str(number)
    )


def sweep(costs: CostTable, trace: Sequence[TraceRequest]) -> list[Prediction]:
    """One prediction for each number of rows that a decode program of the plan has."""
    plan = costs.plan
    sizes = {b.num_rows for b in plan.buckets if b.kind is BatchKind.DECODE} | {plan.max_num_seqs}
    return [predict(with_rows(plan, n), costs, trace) for n in sorted(sizes)]


def with_rows(plan: EnginePlan, max_num_seqs: int) -> EnginePlan:
    """The plan for fewer rows; a program costs what it cost with more."""
    decode = [b for b in plan.buckets if b.kind is BatchKind.DECODE and b.num_rows <= max_num_seqs]
    mixed = [
        BatchBucket(b.num_tokens, min(b.num_tokens, max_num_seqs), b.kind)
        for b in plan.buckets
        if b.kind is BatchKind.MIXED
    ]
    return replace(plan, max_num_seqs=max_num_seqs, buckets=(*decode, *dict.fromkeys(mixed)))


def best(predictions: Sequence[Prediction]) -> Prediction:
    """The fewest rows with which throughput is within 2 % of the highest."""
    most = max(p.output_tokens_per_second for p in predictions)
    return next(p for p in predictions if p.output_tokens_per_second >= 0.98 * most)
