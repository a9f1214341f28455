"""What each program costs: a table of seconds, as measured, that a prediction is driven by.

The file is JSON: ``version``, ``source``, the ``plan`` that was measured, and ``programs``: points,
each with its bucket, the ``seconds`` of a step, of how many ``steps``, and what these attended to
in the mean: ``read`` and ``pairs`` of ``Work``. ``jaxllm bench latency --json`` has the same as its
``cost``.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import msgspec
import numpy as np

from jaxllm.config.plan import BatchBucket, EnginePlan
from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.journal.file import read_journal
from jaxllm.journal.records import Decided, Failed, Fetched, int32s
from jaxllm.journal.replay import read_header

VERSION = 2


class Work(NamedTuple):
    """What a step attends to, beside what its program costs whoever is in it. Two numbers, since a
    row that feeds one token costs what reading its context takes, and a chunk what computing does:
    on a GPU a hundred times less for each pair.
    """

    read: float = 0  # tokens of context, of rows that feed one token
    pairs: float = 0  # of a token fed and one it attends to, in rows that feed more; causal


class ProgramCost(msgspec.Struct, frozen=True):
    bucket: BatchBucket
    seconds: float  # from the end of the step before, or its own dispatch, to its results
    steps: int
    read: float = 0.0
    pairs: float = 0.0


class CostTable(msgspec.Struct, frozen=True):
    plan: EnginePlan
    programs: tuple[ProgramCost, ...]
    async_scheduling: bool = True
    source: str = ""
    version: int = VERSION


def work_of(starts: np.ndarray, num_new_tokens: np.ndarray) -> Work:
    """Of a step, by rows: tokens computed before, and tokens fed; integers [n]."""
    starts, fed = starts.astype(np.int64), num_new_tokens.astype(np.int64)
    attended = fed * starts + fed * (fed + 1) // 2
    alone = fed == 1
    return Work(int(attended[alone].sum()), int(attended[~alone].sum()))


class SeenStep(NamedTuple):
    bucket: BatchBucket
    work: Work
    seconds: float


def cost_of_journal(path: Path) -> CostTable:
    """The costs of the steps that a journal tells of: of each program two points, for its steps
    that read little and those that read much.

    Raises:
        JournalError: the file is not a whole journal.
        ConfigError: it tells of no step.
    """
    stream = read_journal(path)
    header = read_header(stream, path)
    by_bucket: dict[BatchBucket, list[SeenStep]] = defaultdict(list)
    for step in _seen_steps(stream, header.plan):
        by_bucket[step.bucket].append(step)
    if not by_bucket:
        raise ConfigError(f"{path} holds no step that was completed: there are no costs to take.")
    programs: list[ProgramCost] = []
    for _, steps in sorted(by_bucket.items()):
        counted = steps[1:] or steps  # a program's first step may load it
        reads = [step.work.read for step in counted]
        middle = (min(reads) + max(reads)) / 2
        for much in (False, True):
            part = [step for step in counted if (step.work.read > middle) == much]
            programs += [_mean(part)] if part else []
    source = f"{header.model} of {path.name}"
    return CostTable(header.plan, tuple(programs), header.async_scheduling, source)


def _mean(steps: Sequence[SeenStep]) -> ProgramCost:
    """Means, not medians: they add up to what a run takes."""
    read, pairs = (fmean(column) for column in zip(*(step.work for step in steps), strict=True))
    seconds = fmean(step.seconds for step in steps)
    return ProgramCost(steps[0].bucket, seconds, len(steps), read, pairs)


def _seen_steps(stream: Iterator[object], plan: EnginePlan) -> Iterator[SeenStep]:
    """The device began a step when it had it and was done before."""
    decided: dict[int, Decided] = {}
    fetched = 0.0
    for record in stream:
        if isinstance(record, Decided):
            decided[record.step_id] = record
        elif isinstance(record, Failed):
            decided.clear()
        elif isinstance(record, Fetched):
            step = decided.pop(record.step_id)
            work = work_of(int32s(step.starts), int32s(step.num_new_tokens))
            seconds = record.time - max(step.time, fetched)
            yield SeenStep(plan.buckets[step.bucket], work, seconds)
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
