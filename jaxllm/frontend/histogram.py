"""A histogram that costs almost nothing to add to. Knows nobody who shows it."""

from bisect import bisect_left
from collections.abc import Iterable


class Histogram:
    """``counts[i]`` values were at most ``bounds[i]`` and more than the bound before; the last
    count is of those above all bounds.
    """

    def __init__(self, bounds: Iterable[float]):
        self.bounds = tuple(sorted(bounds))
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """``count`` times the same value."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def cumulative(self) -> list[tuple[float, int]]:
        """(bound, how many values were at most that); the last bound is infinite."""
        total = 0
        pairs: list[tuple[float, int]] = []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            pairs.append((bound, total))
        return pairs


def bounds_1_2_5(largest: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, ... up to ``largest``."""
    powers = [10**exponent for exponent in range(len(str(largest)))]
    return [float(digit * p) for p in powers for digit in (1, 2, 5) if digit * p <= largest]
