"""Tells an engine that died from one that keeps dying. Knows durations only."""

from collections import deque

MAX_DEATHS = 3
WINDOW_S = 60.0


class DeathRecord:
    """Deaths by the time that engines have served, all generations together.

    Starting and hanging do not count as service. So an engine that takes minutes to load, or that
    hangs in every first step, is found to be hopeless like one that crashes at once.
    """

    def __init__(self) -> None:
        self._served_s = 0.0
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)

    @property
    def hopeless(self) -> bool:
        """``MAX_DEATHS`` within ``WINDOW_S`` of service."""
        deaths = self._deaths
        return len(deaths) == MAX_DEATHS and deaths[-1] - deaths[0] <= WINDOW_S

    def add(self, served_s: float) -> None:
        """An engine died that had served so long; 0 for one that did not come up."""
        self._served_s += max(served_s, 0.0)
        self._deaths.append(self._served_s)
