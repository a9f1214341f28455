"""How a device program is timed."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def median_seconds(
    dispatch: Callable[[], Any], *, calls: int = 1, queued: int = 3, runs: int = 20
) -> float:
    """Seconds of one of the ``calls`` that one dispatch makes on the device.

    The host's share is hidden twice: the calls are chained in one program, as the layers of a
    model are, and ``queued`` dispatches are under way before the host waits. The first dispatch,
    which may compile, does not count.
    """
    jax.block_until_ready(dispatch())
    times: list[float] = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready([dispatch() for _ in range(queued)])
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / (queued * calls)


def busy_seconds(dispatch: Callable[[], Any], *, calls: int = 1, runs: int = 5) -> float | None:
    """Seconds per call that the GPU was running a kernel, by the profiler: the time without the
    gaps between launches, which an operation alone cannot close. None on other devices.
    """
    if jax.default_backend() != "gpu":
        return None
    jax.block_until_ready(dispatch())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([dispatch() for _ in range(runs)])
        traces = list(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(traces[0])).planes if traces else ()
        nanoseconds = sum(
            event.duration_ns
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        )
    return nanoseconds * 1e-9 / (runs * calls) if nanoseconds else None
