"""Time, injected, so that tests decide what time it is."""

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()
