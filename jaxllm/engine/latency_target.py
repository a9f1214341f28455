"""How large a step may be so that decoding requests get their next token in time."""

from collections import deque
from collections.abc import Iterable

from jaxllm.config.plan import BatchBucket, BatchKind

_WINDOW = 32  # steps of a program that count
_SHARE = 0.9  # of them that a step is expected to be no slower than; what is slower was an accident
_RETRY_AFTER = 500  # steps; then a program that was too slow is tried again


class _Cost:
    """Seconds that steps of one program took lately."""

    def __init__(self, seconds: float, number: int):
        self._recent = deque((seconds,), _WINDOW)
        self.expected = seconds
        self.seen = number  # of the step that was observed last

    def observe(self, seconds: float, number: int) -> None:
        self._recent.append(seconds)
        self.expected = sorted(self._recent)[int(_SHARE * (len(self._recent) - 1))]
        self.seen = number


class LatencyTarget:
    """Learns what the programs of mixed steps cost and chooses the largest that is in time.

    A step costs what its program costs, so there is one expectation per program. One that was
    never run is judged by the smaller ones, and only the next larger is tried at a time.
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
        in_time = [s for s, cost in self._costs.items() if cost.expected <= self.target_s]
        limit, reached = self._sizes[0], max(in_time, default=0)
        for size in self._sizes:
            cost = self._costs.get(size)
            if cost is None and size < reached:
                continue  # costs no more than what is in time
            expected = self._guess(size) if cost is None else cost.expected
            if expected > self.target_s:
                return size if self._is_old(cost) else limit
            if cost is None:
                return size
            limit = size
        return limit

    def _is_old(self, cost: _Cost | None) -> bool:
        return self._num_steps - (0 if cost is None else cost.seen) > _RETRY_AFTER

    def _guess(self, size: int) -> float:
        """Seconds of a program not known: on the line through the next two smaller ones. With
        fewer known, the least that it can be, since something must be tried.
        """
        smaller = [s for s in self._sizes if s < size and s in self._costs][-2:]
        known = [self._costs[s].expected for s in smaller]
        if len(known) < 2:
            return known[0] if known else 0.0
        slope = max(0.0, (known[1] - known[0]) / (smaller[1] - smaller[0]))
        return known[1] + slope * (size - smaller[1])
