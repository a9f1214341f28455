"""Where the host's time of a step goes, phase by phase, of an engine in this process."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from jaxllm.engine.engine_core import EngineCore

# "wait": for the device. "masks": filling them, once the tokens before are known; then the sampler
# of the step that waits for them is dispatched. "follow": telling grammars what was drawn.
PHASES = (
    ("scheduler", "schedule", "schedule"),
    ("scheduler", "update", "update"),
    ("executor", "dispatch", "dispatch"),
    ("executor", "fetch", "wait"),
    ("executor", "_follow", "follow"),
    ("executor", "_finish_waiting", "masks"),
    ("executor", "_sample", "dispatch the sampler"),
)


class HostPhases:
    """Seconds by phase, taken where its function is called; one inside another counts for itself
    alone.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []  # seconds of phases inside each that is open

    def watch(self, core: EngineCore) -> None:
        for owner, method, phase in PHASES:
            self.time(getattr(core, owner), method, phase)

    def time(self, owner: Any, method: str, phase: str) -> None:
        """Count the calls of ``owner.method`` as ``phase``, until the owner is gone."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = self._now() - began
                self._seconds[phase] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        setattr(owner, method, timed)

    def take(self, num_steps: int) -> dict[str, int]:
        """Microseconds a step since the last call."""
        found = {phase: round(s / num_steps * 1e6) for phase, s in self._seconds.items()}
        self._seconds.clear()
        return found
