"""Where the host's time of a step goes, phase by phase, of an engine in this process."""

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import Any

from jaxllm.engine.engine_core import EngineCore

FIRST = "schedule"  # of a step
# "wait": for the device, or for the thread that tells grammars what was drawn ("follow"). "wait for
# masks": where that thread fills them still. Then the sampler that they are for is dispatched.
PHASES = (
    ("scheduler", "schedule", FIRST),
    ("scheduler", "update", "update"),
    ("executor", "dispatch", "dispatch"),
    ("executor", "fetch", "wait"),
    ("executor", "_masking.follow", "follow"),
    ("executor", "_masking.fill", "masks"),
    ("executor", "_finish_waiting", "wait for masks"),
    ("executor", "_sample", "dispatch the sampler"),
)


class HostPhases:
    """Seconds by step and phase, taken where a phase's function is called; a phase inside another
    counts for itself alone, and one of another thread is told apart.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._steps: list[dict[str, float]] = []
        self._began: list[float] = []  # each step
        self._inner: list[float] = []  # seconds of phases inside each that is open
        self._thread = threading.get_ident()

    def watch(self, core: EngineCore) -> None:
        for name, path, phase in PHASES:
            owner, *inner, method = getattr(core, name), *path.split(".")
            self.time(reduce(getattr, inner, owner), method, phase)

    def time(self, owner: Any, method: str, phase: str) -> None:
        """Count the calls of ``owner.method`` as ``phase``, until the owner is gone."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            if threading.get_ident() != self._thread:
                result = function(*args, **kwargs)
                self._steps[-1][f"{phase}, beside"] += self._now() - began
                return result
            if phase == FIRST:
                self._steps.append(defaultdict(float))
                self._began.append(began)
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = self._now() - began
                own = took - self._inner.pop()
                if self._steps:
                    self._steps[-1][phase] += own
                if self._inner:
                    self._inner[-1] += took

        setattr(owner, method, timed)

    def take(self) -> dict[str, int]:
        """Microseconds of a step, and of each phase that most steps have, since the last call:
        medians, so that neither prefills nor what else the machine does count.
        """
        steps, self._steps, began, self._began = self._steps, [], self._began, []
        times = {"step": [b - a for a, b in pairwise(began)]}
        for phase in dict.fromkeys(phase for step in steps for phase in step):
            found = [step[phase] for step in steps if phase in step]
            if 2 * len(found) >= len(steps):
                times[phase] = found
        return {name: round(statistics.median(found) * 1e6) for name, found in times.items()}
