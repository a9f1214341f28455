"""How long a step takes, by a table of what others took.

A step costs what its program costs, what its decoding rows' contexts cost to read, and what its
chunks' attention costs to compute. Reading a token costs the same in every program, so that
all of them tell what; a pair of a chunk costs more in a small program, which keeps a part of the
device busy, so that each has its own rate where it was measured at very different lengths.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

from jaxllm.config.plan import BatchBucket
from jaxllm.simulation.cost import CostTable, ProgramCost, Work

NO_WORK = Work()
# Points tell a rate if the largest amount of work is so many times the least: what all programs
# tell together is safer than what one does.
_LEVERAGE, _LEVERAGE_ALONE = 2.0, 8.0

_Points = Sequence[tuple[float, float, int]]  # amount of work, seconds, number of steps


class StepTimes:
    """Least squares over the table's points."""

    def __init__(self, table: CostTable):
        programs: dict[BatchBucket, list[ProgramCost]] = defaultdict(list)
        for program in table.programs:
            programs[program.bucket].append(program)
        self._per_read = _rate(
            [(p.read, p.seconds, p.steps) for p in points if not p.pairs]
            for points in programs.values()
        )
        computed = {
            bucket: [(p.pairs, p.seconds - self._per_read * p.read, p.steps) for p in points]
            for bucket, points in programs.items()
        }
        shared = _rate(computed.values())
        self._per_pair = {
            bucket: _rate([points], shared, _LEVERAGE_ALONE) for bucket, points in computed.items()
        }
        # Where contexts were short, the rest may come out too small: it is half of a step at least.
        self._rest = {
            bucket: max(
                _mean((s - self._per_pair[bucket] * pairs, n) for pairs, s, n in points),
                min(p.seconds for p in programs[bucket]) / 2,
            )
            for bucket, points in computed.items()
        }

    def seconds(self, bucket: BatchBucket, work: Work = NO_WORK) -> float:
        """Of a step in this bucket: as measured, or between the measured ones of its kind, by
        tokens; beyond them in proportion. A kind never measured is taken for the other.
        """
        same = [b for b in self._rest if b.kind is bucket.kind] or list(self._rest)
        points: dict[int, list[float]] = defaultdict(list)
        for known in same:
            chunks = self._per_pair[known] * work.pairs
            points[known.num_tokens].append(self._rest[known] + chunks)
        sizes, reading = sorted(points), self._per_read * work.read
        i = bisect_left(sizes, bucket.num_tokens)
        if i == len(sizes):
            return fmean(points[sizes[-1]]) * bucket.num_tokens / sizes[-1] + reading
        slow = fmean(points[sizes[i]])
        if i == 0 or sizes[i] == bucket.num_tokens:
            return slow + reading  # a smaller program is not dearer; how much cheaper is not known
        fast = fmean(points[sizes[i - 1]])
        share = (bucket.num_tokens - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return fast + (slow - fast) * share + reading


def _rate(groups: Iterable[_Points], default: float = 0.0, leverage: float = _LEVERAGE) -> float:
    """Seconds for each unit of work: the slope common to all groups, each of which costs something
    else beside. Groups that are measured at one amount of work do not count.
    """
    across = along = 0.0
    for points in groups:
        amounts = [amount for amount, _, _ in points]
        if not points or max(amounts) < leverage * min(amounts) or not max(amounts):
            continue
        amount = _mean((a, n) for a, _, n in points)
        seconds = _mean((s, n) for _, s, n in points)
        across += sum(n * (a - amount) * (s - seconds) for a, s, n in points)
        along += sum(n * (a - amount) ** 2 for a, _, n in points)
    return max(0.0, across / along) if along else default


def _mean(weighted: Iterable[tuple[float, int]]) -> float:
    values = list(weighted)
    return sum(value * n for value, n in values) / sum(n for _, n in values)
