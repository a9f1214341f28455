"""How a device program is timed."""

import statistics
import time
from collections.abc import Callable
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
