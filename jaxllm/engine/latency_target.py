"""How large a step may be so that decoding requests get their next token in time."""

from collections import deque
from collections.abc import Iterable
from statistics import median

from jaxllm.config.plan import BatchBucket, BatchKind

_WINDOW = 32  # steps by which is told how far they scatter
_SHARE = 0.9  # of them that a step is expected to be no slower than; what is slower was an accident
_LATELY = 5  # steps by which is told how heavy they are now
_LEARNS = 3  # steps after a change of program that tell what the new one costs
_RETRY_AFTER = 500  # steps; then a program that was too slow is tried again


class _Cost:
    """Seconds that steps of one program took, without what made all steps heavy at the time."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=_WINDOW)
        self.seen = 0  # number of the step that was observed last

    @property
    def usual(self) -> float:
        return median(self._samples)

    def learn(self, seconds: float) -> None:
        self._samples.append(seconds)


class LatencyTarget:
    """Learns what the programs of mixed steps cost and chooses the largest that is in time.

    A step costs what its program costs, full or not, and what contexts cost that it attends to.
    The second changes from step to step, but is about the same whatever the program: it is told by
    the last few steps, of whichever programs, and the first by those that follow a change.
    A program that was never run is judged by the smaller ones, and only the next larger is tried at
    a time.
    """

    def __init__(self, buckets: Iterable[BatchBucket], target_s: float):
        self.target_s = target_s
        self._sizes = sorted({b.num_tokens for b in buckets if b.kind is BatchKind.MIXED})
        self._costs: dict[int, _Cost] = {}  # by number of tokens
        self._num_steps = 0
        self._last = self._since = 0  # size of the last mixed step, and how many of it in a row
        self._more: deque[float] = deque((0.0,), _LATELY)  # than usual, of the last mixed steps
        self._scatter: deque[float] = deque((0.0,), _WINDOW)

    def observe(self, bucket: BatchBucket, seconds: float) -> None:
        """A step of ``bucket`` took the device so long."""
        self._num_steps += 1
        if bucket.kind is not BatchKind.MIXED:
            return
        size = bucket.num_tokens
        self._since = self._since + 1 if size == self._last else 1
        self._last = size
        cost = self._costs.get(size)
        if cost is None or self._is_old(cost):
            cost = self._costs[size] = _Cost()
            self._since = 1
        cost.seen = self._num_steps
        load = self._load
        if self._since <= _LEARNS:
            cost.learn(seconds - load)
        self._more.append(seconds - cost.usual)
        self._scatter.append(seconds - cost.usual - load)

    @property
    def token_limit(self) -> int:
        """Tokens of the largest program in time; of the smallest, if none is."""
        known = {size: self._expected(size) for size in self._costs}
        in_time = [size for size, expected in known.items() if expected <= self.target_s]
        limit, reached = self._sizes[0], max(in_time, default=0)
        for size in self._sizes:
            cost = self._costs.get(size)
            if cost is None and size < reached:
                continue  # costs no more than what is in time
            expected = self._guess(size, known) if cost is None else known[size]
            if expected > self.target_s:
                return size if self._is_old(cost) else limit
            if cost is None:
                return size
            limit = size
        return limit

    @property
    def _load(self) -> float:
        """Seconds by which steps are heavier now than their programs were when they were learnt.
        One accident does not count; two heavy steps in a row do.
        """
        return max(median(self._more), min(list(self._more)[-2:]))

    def _expected(self, size: int) -> float:
        scatter = sorted(self._scatter)[int(_SHARE * (len(self._scatter) - 1))]
        return self._costs[size].usual + self._load + max(scatter, 0.0)

    def _is_old(self, cost: _Cost | None) -> bool:
        return self._num_steps - (0 if cost is None else cost.seen) > _RETRY_AFTER

    def _guess(self, size: int, known: dict[int, float]) -> float:
        """Seconds of a program not known: on the line through the next two smaller ones. With
        fewer known, the least that it can be, since something must be tried.
        """
        smaller = sorted(s for s in known if s < size)[-2:]
        if len(smaller) < 2:
            return known[smaller[0]] if smaller else 0.0
        low, high = smaller
        slope = max(0.0, (known[high] - known[low]) / (high - low))
        return known[high] + slope * (size - high)
