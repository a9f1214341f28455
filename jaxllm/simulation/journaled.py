"""Engines that write a journal, which is replayed when they end."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxllm.core.scheduler import Scheduler
from jaxllm.journal.core import JournaledCore, open_journal
from jaxllm.journal.replay import replay
from jaxllm.simulation.checked import CheckedCore
from jaxllm.simulation.violation import require

MAX_BYTES = 2**26


class JournaledChecked(JournaledCore, CheckedCore):
    """The simulation's engine core, writing."""


def start_journaled(
    scheduler: Scheduler, executor: Any, *, async_scheduling: bool, **options: Any
) -> tuple[CheckedCore, Callable[[], None]]:
    """An engine core, and what checks its journal: every decision is made again as it was."""
    folder = TemporaryDirectory(prefix="jaxllm-simulation-")
    path = Path(folder.name) / "journal"
    journal = open_journal(
        path,
        MAX_BYTES,
        scheduler.plan,
        "",
        async_scheduling=async_scheduling,
        scheduling=scheduler.scheduling,
    )
    core = JournaledChecked(
        scheduler, executor, journal=journal, async_scheduling=async_scheduling, **options
    )

    def check() -> None:
        journal.close()
        result = replay(path)
        folder.cleanup()
        require(result.difference is None, "journal", f"A replay differs: {result.difference}")
        require(result.error is None, "journal", f"A replay ends with {result.error}")
        made = scheduler.num_steps, set(scheduler.requests)
        again = result.num_steps, set(result.unfinished)
        require(result.full or made == again, "journal", f"A replay makes {again} of {made}.")

    return core, check
