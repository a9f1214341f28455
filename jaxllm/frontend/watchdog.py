"""Finds an engine that is alive and gets nothing done. Knows messages and time, no processes."""

import asyncio
import time
from collections.abc import Callable

from jaxllm.messages import EngineStats, FromEngine

MIN_TICK_S, MAX_TICK_S = 0.01, 1.0
TICKS = 20  # within the timeout, as far as these allow


class Watchdog:
    """Counts how long the engine has shown no progress.

    Progress is a step's results, a step more than last time, or the word that there is nothing to
    do. An engine that says nothing is pinged, which an idle one answers at once and a busy one
    need not; so a stopped process is found whether it had work or not.

    Time in which this process itself stood still (stopped, suspended) does not count: what the
    engine said meanwhile has not been read yet.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic):
        self.timeout_s = timeout_s
        self.silent_s = 0.0
        self._tick_s = min(max(timeout_s / TICKS, MIN_TICK_S), MAX_TICK_S)
        self._clock = clock
        self._num_steps = -1
        self._pinged = False

    @property
    def late(self) -> bool:
        """Whether the engine has been silent for longer than it should, though not yet too long."""
        return self.silent_s > self.timeout_s / 4

    def heard(self, message: FromEngine) -> None:
        """Note what the engine said."""
        if isinstance(message, EngineStats):
            idle = not message.num_running and not message.num_waiting
            if not idle and message.num_steps == self._num_steps:
                return
            self._num_steps = message.num_steps
        self.silent_s = 0.0
        self._pinged = False

    async def watch(self, ping: Callable[[], None]) -> None:
        """Returns when the engine hangs."""
        before = self._clock()
        while self.silent_s < self.timeout_s:
            await asyncio.sleep(self._tick_s)
            now = self._clock()
            self.silent_s += min(now - before, 2 * self._tick_s)
            before = now
            if self.silent_s > self.timeout_s / 10 and not self._pinged:
                self._pinged = True
                ping()
