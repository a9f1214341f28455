"""How large a step may be so that decoding requests get their next token in time."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxllm.config.plan import BatchBucket, BatchKind

_GAIN = 1 / 8  # of a new observation
_SPREADS = 2.0  # above the mean that a step is expected to take at most
_OUTLIER = 4.0  # times the mean; what takes longer was the machine's affair, not the program's
_RETRY_AFTER = 500  # steps; then a program that was too slow is tried again


@dataclass(slots=True)
class _Cost:
    """Seconds of one program's steps, exponentially averaged as TCP does round trips (RFC 6298)."""

    mean: float
    seen: int  # number of the step that was observed last
    spread: float = 0.0  # mean deviation

    def observe(self, seconds: float, number: int) -> None:
        error = min(seconds, _OUTLIER * self.mean) - self.mean
        self.mean += _GAIN * error
        self.spread += _GAIN * (abs(error) - self.spread)
        self.seen = number

    @property
    def expected(self) -> float:
        return self.mean + _SPREADS * self.spread


class LatencyTarget:
    """Learns what the programs of mixed steps cost and chooses the largest that is in time.

    A step costs what its program costs, so there is one average per program. One that was never
    run is judged by the smaller ones, and only the next larger is tried at a time.
    """

    def __init__(self, buckets: Iterable[BatchBucket], target_s: float):
        self.target_s = target_s
        self._sizes = sorted({b.num_tokens for b in buckets if b.kind is BatchKind.MIXED})
        self._costs: dict[int, _Cost] = {}  # by number of tokens
        self._num_steps = 0

    def observe(self, bucket: BatchBucket, seconds: float) -> None:
        """A step of ``bucket`` took the device so long."""
        self._num_steps += 1
        if bucket.kind is not BatchKind.MIXED:
            return
        cost = self._costs.get(bucket.num_tokens)
        if cost is None or self._is_old(cost):
            self._costs[bucket.num_tokens] = _Cost(seconds, self._num_steps)
        else:
            cost.observe(seconds, self._num_steps)

    @property
    def token_limit(self) -> int:
        """Tokens of the largest program in time; of the smallest, if none is."""
        limit = self._sizes[0]
        for size in self._sizes:
            cost = self._costs.get(size)
            if cost is None or (self._late(cost.expected) and self._is_old(cost)):
                return limit if self._late(self._guess(size)) else size
            if self._late(cost.expected):
                return limit
            limit = size
        return limit

    def _late(self, seconds: float) -> bool:
        return seconds > self.target_s

    def _is_old(self, cost: _Cost) -> bool:
        return self._num_steps - cost.seen > _RETRY_AFTER

    def _guess(self, size: int) -> float:
        """Seconds of a program, on the line through the next two smaller ones, or from the origin;
        0 if there are none, as something must be tried.
        """
        smaller = [s for s in self._sizes if s < size and s in self._costs][-2:]
        if not smaller:
            return 0.0
        last = smaller[-1]
        cost = self._costs[last].mean
        slope = cost / last
        if len(smaller) == 2:
            first = smaller[0]
            slope = max(0.0, (cost - self._costs[first].mean) / (last - first))
        return cost + slope * (size - last)
