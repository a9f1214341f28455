"""Runs the real scheduler and engine core over a journal, without a device, and compares."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, override

import numpy as np

from jaxllm.config.plan import BatchBucket, EnginePlan
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.engine_core import Dispatched, EngineCore, StepFailed
from jaxllm.engine.executor import LogprobArrays, ModelRunnerOutput
from jaxllm.engine.latency_target import LatencyTarget
from jaxllm.errors import JaxLLMError
from jaxllm.journal.file import JournalError, read_journal
from jaxllm.journal.records import (
    VERSION,
    Aborted,
    Added,
    Decided,
    Failed,
    Fetched,
    Full,
    Header,
    Heard,
    Record,
    Waited,
    decided,
    int32s,
)
from jaxllm.messages import StepOutputs
from jaxllm.sampling_params import MAX_LOGPROBS

Told = Callable[[StepOutputs | None, float], None]


class DecisionDiffersError(JaxLLMError):
    """The scheduler decides otherwise than the journal says it did. ``now`` is None for no step,
    ``then`` for none recorded.
    """

    def __init__(self, then: Decided | None, now: Decided | None):
        super().__init__("The scheduler decides otherwise than it did.")
        self.then, self.now = then, now


class JournalEndsError(Exception):
    """The writer was killed, or the journal full, in the middle of this turn."""


@dataclass
class Replay:
    """What came of it. ``difference`` is None if every decision was made again as recorded."""

    header: Header
    num_requests: int = 0
    num_steps: int = 0
    num_tokens: int = 0  # sampled
    num_failures: int = 0
    full: bool = False  # the journal reached its size
    unfinished: list[str] = field(default_factory=list)  # requests at the end of the journal
    difference: DecisionDiffersError | None = None
    error: str | None = None  # that the scheduler raised: the bug the engine died of


class _Records:
    """The journal, with a look at what comes next."""

    def __init__(self, records: Iterator[Record]):
        self._records = records
        self.next: Record | None = next(records, None)

    def take(self) -> Record | None:
        record, self.next = self.next, next(self._records, None)
        return record


class _NoDevice:
    """Where results come from the journal there is nothing to dispatch, fetch or forget."""

    def dispatch(self, plan: SchedulerOutput) -> None:
        return None

    def fetch(self, handle: Any) -> ModelRunnerOutput:
        raise JournalError("A replay has no device.")

    def reset(self) -> None:
        return None


class _RecordedClock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


class _RecordedLimit(LatencyTarget):
    """The limit of the turn that comes next."""

    def __init__(self, records: _Records):
        self._records = records

    @override
    def observe(self, bucket: BatchBucket, seconds: float) -> None:
        return None

    @property
    @override
    def token_limit(self) -> int | None:
        record = self._records.next
        return record.token_limit if isinstance(record, Decided | Waited) else None


class ReplayedCore(EngineCore):
    """An engine core whose device is the journal."""

    def __init__(self, header: Header, records: _Records):
        self.clock = _RecordedClock()
        super().__init__(
            Scheduler(header.plan, header.scheduling, cache_key=header.cache_key),
            _NoDevice(),
            async_scheduling=header.async_scheduling,
            clock=self.clock,
            latency_target=_RecordedLimit(records),
        )
        self._records = records
        self.num_sampled = self.num_failures = 0

    @override
    def _dispatch(self, step: SchedulerOutput) -> Dispatched:
        then, now = self._records.next, decided(step, self.scheduler.plan, self.clock.time)
        if then is None or isinstance(then, Full):
            raise JournalEndsError
        if not isinstance(then, Decided) or not same_decision(then, now):
            raise DecisionDiffersError(then if isinstance(then, Decided) else None, now)
        self._records.take()
        self._raise_recorded("dispatch")
        return Dispatched(step, None, self.clock.time)

    @override
    def _fetch(self, due: Dispatched) -> ModelRunnerOutput:
        if isinstance(self._records.next, Waited):
            self._records.take()
        elif isinstance(self._records.next, Decided):
            raise DecisionDiffersError(self._records.next, None)
        self._raise_recorded("fetch")
        record = self._records.next
        if record is None or isinstance(record, Full):
            raise JournalEndsError
        self._records.take()
        if not isinstance(record, Fetched) or record.step_id != due.step.step_id:
            raise JournalError(
                f"Results of step {due.step.step_id} are due, but there is {record}."
            )
        self.clock.time = record.time
        output = recorded_output(record, due.step, self.scheduler.plan)
        self.num_sampled += int((due.step.samples & output.finite).sum())
        return output

    def _raise_recorded(self, where: str) -> None:
        record = self._records.next
        if isinstance(record, Failed) and record.where == where:
            self._records.take()
            self.num_failures += 1
            raise StepFailed(where) from JaxLLMError(record.error)


def same_decision(one: Decided, other: Decided) -> bool:
    fields = (name for name in Decided.__struct_fields__ if name not in ("time", "token_limit"))
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def recorded_output(record: Fetched, step: SchedulerOutput, plan: EnginePlan) -> ModelRunnerOutput:
    """Log-probabilities and embeddings, which no decision depends on, are zeros."""
    n = step.rows.size
    finite = np.frombuffer(record.finite, bool) if record.finite else np.ones(n, bool)
    return ModelRunnerOutput(
        step.step_id,
        int32s(record.token_ids),
        finite,
        _zero_logprobs(n),
        _zero_logprobs(step.num_tokens),
        step.bucket.num_tokens,
        np.zeros((n, 1), np.float32),
        record.forced,
    )


def _zero_logprobs(n: int) -> LogprobArrays:
    shape = (n, MAX_LOGPROBS)
    zeros = np.zeros(n, np.float32), np.zeros(n, np.int32)
    return LogprobArrays(*zeros, np.zeros(shape, np.int32), np.zeros(shape, np.float32))


def read_header(records: Iterator[Record], path: Path) -> Header:
    """The first record. Raises JournalError if there is none, or of another version."""
    header = next(records, None)
    if not isinstance(header, Header):
        raise JournalError(f"{path} has no header: its writer ended before it began.")
    if header.version != VERSION:
        raise JournalError(f"{path} has format {header.version}; this version reads {VERSION}.")
    return header


def replay(path: Path, told: Told = lambda outputs, time: None) -> Replay:
    """Feed the journal to a new engine core, up to its end or the first difference. ``told`` gets
    what clients were told, and when.

    Raises:
        JournalError: the file is not a whole journal.
    """
    stream = read_journal(path)
    header = read_header(stream, path)
    records, result = _Records(stream), Replay(header)
    core = ReplayedCore(header, records)
    try:
        while records.next is not None and not isinstance(records.next, Full):
            _turn(core, records, result, told)
    except DecisionDiffersError as difference:
        result.difference = difference
    except JournalEndsError:
        pass
    except JournalError:
        raise
    except JaxLLMError as error:
        result.error = f"{type(error).__name__}: {error}"
    result.full = isinstance(records.next, Full)
    result.num_steps, result.num_tokens = core.scheduler.num_steps, core.num_sampled
    result.num_failures = core.num_failures
    result.unfinished = list(core.scheduler.requests)
    return result


def _turn(core: ReplayedCore, records: _Records, result: Replay, told: Told) -> None:
    """Apply the next record that is not part of a turn, or make a turn with those that are."""
    record = records.next
    core.clock.time = getattr(record, "time", core.clock.time)
    if isinstance(record, Added):
        records.take()
        result.num_requests += 1
        core.add_request(record.request)
    elif isinstance(record, Aborted):
        records.take()
        core.abort(record.request_ids)
    elif isinstance(record, Heard):
        records.take()
        core.hear(record.news)
    elif isinstance(record, Decided | Waited):
        told(core.step(), core.clock.time)
        if records.next is record and isinstance(record, Waited):
            records.take()
        elif records.next is record:
            raise DecisionDiffersError(record if isinstance(record, Decided) else None, None)
    else:
        raise JournalError(f"A {type(record).__name__} record stands where none can be.")
