"""What each program costs: a table of seconds, as measured, that a prediction is driven by.

The file is JSON: ``version``, ``source``, the ``plan`` that was measured, and ``programs``, each
with its bucket, the mean ``seconds`` of a step, and of how many ``steps``; ``attended`` where steps
that attend to few tokens and to many were told apart. ``jaxllm bench latency --json`` has the same
as its ``cost``.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np

from jaxllm.config.plan import BatchBucket, EnginePlan
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.journal.file import read_journal
from jaxllm.journal.records import Decided, Failed, Fetched
from jaxllm.journal.replay import read_header

VERSION = 1


class ProgramCost(msgspec.Struct, frozen=True):
    bucket: BatchBucket
    seconds: float  # from the end of the step before, or its own dispatch, to its results
    steps: int
    attended: float | None = None  # as num_attended, the mean of these steps


class CostTable(msgspec.Struct, frozen=True):
    plan: EnginePlan
    programs: tuple[ProgramCost, ...]
    async_scheduling: bool = True
    source: str = ""
    version: int = VERSION

    def seconds(self, bucket: BatchBucket, attended: int = 0) -> float:
        """Of a step in this bucket: as measured, or between the measured ones of its kind, by
        tokens; beyond them in proportion. A kind never measured is taken for the other.
        """
        same = [p for p in self.programs if p.bucket.kind is bucket.kind] or self.programs
        points: dict[int, list[ProgramCost]] = defaultdict(list)
        for program in same:
            points[program.bucket.num_tokens].append(program)
        sizes = sorted(points)
        i = bisect_left(sizes, bucket.num_tokens)
        if i < len(sizes) and sizes[i] == bucket.num_tokens:
            return _at(points[sizes[i]], attended)
        if i == len(sizes):
            return _at(points[sizes[-1]], attended) * bucket.num_tokens / sizes[-1]
        if i == 0:  # a smaller program is not dearer; how much cheaper is not known
            return _at(points[sizes[0]], attended)
        fast, slow = (_at(points[size], attended) for size in sizes[i - 1 : i + 1])
        share = (bucket.num_tokens - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return fast + (slow - fast) * share


def _at(points: list[ProgramCost], attended: int) -> float:
    """On the line through the points of one program; never below half of the cheapest."""
    low, high = (f(points, key=lambda p: p.attended or 0.0) for f in (min, max))
    if low.attended is None or high.attended is None or high.attended <= low.attended:
        return fmean(point.seconds for point in points)
    slope = max(0.0, (high.seconds - low.seconds) / (high.attended - low.attended))
    return max(low.seconds + slope * (attended - low.attended), low.seconds / 2)


def num_attended(step: SchedulerOutput) -> int:
    """Pairs of a token fed and one it attends to, with causal attention."""
    starts, fed = step.starts.astype(np.int64), step.num_new_tokens.astype(np.int64)
    return int((fed * starts + fed * (fed + 1) // 2).sum())


def cost_of_journal(path: Path) -> CostTable:
    """The costs of the steps that a journal tells of.

    Raises:
        JournalError: the file is not a whole journal.
        ConfigError: it tells of no step.
    """
    stream = read_journal(path)
    header = read_header(stream, path)
    buckets = header.plan.buckets
    seconds: dict[BatchBucket, list[float]] = defaultdict(list)
    for bucket, taken in _step_seconds(stream):
        seconds[buckets[bucket]].append(taken)
    if not seconds:
        raise ConfigError(f"{path} holds no step that was completed: there are no costs to take.")
    # A program's first step may load it. Means, not medians: they add up to what a run takes.
    counted = {bucket: times[1:] or times for bucket, times in seconds.items()}
    programs = tuple(
        ProgramCost(bucket, fmean(times), len(times)) for bucket, times in sorted(counted.items())
    )
    return CostTable(
        header.plan, programs, header.async_scheduling, f"{header.model} of {path.name}"
    )


def _step_seconds(stream: Iterator[object]) -> Iterator[tuple[int, float]]:
    """(bucket, seconds) of each step: the device began when it had it and was done before."""
    decided: dict[int, Decided] = {}
    fetched = 0.0
    for record in stream:
        if isinstance(record, Decided):
            decided[record.step_id] = record
        elif isinstance(record, Failed):
            decided.clear()
        elif isinstance(record, Fetched):
            step = decided.pop(record.step_id)
            yield step.bucket, record.time - max(step.time, fetched)
            fetched = record.time


def write_cost(table: CostTable, path: Path) -> None:
    """Raises ConfigError when the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"--cost {path}: {error.strerror}.") from error


class _Report(msgspec.Struct, frozen=True):
    """Of ``jaxllm bench latency``, or a table itself."""

    cost: CostTable | None = None


def read_cost(path: Path) -> CostTable:
    """Raises ConfigError when it is not a table of costs."""
    try:
        data = path.read_bytes()
        report = msgspec.json.decode(data, type=_Report)
        table = report.cost or msgspec.json.decode(data, type=CostTable)
    except OSError as error:
        raise ConfigError(f"--cost {path}: {error.strerror}.") from error
    except (msgspec.MsgspecError, JaxLLMError) as error:
        raise ConfigError(f"--cost {path} is not a table of costs: {error}") from error
    if table.version != VERSION or not table.programs:
        raise ConfigError(f"--cost {path} has no programs, or another version than {VERSION}.")
    return table
