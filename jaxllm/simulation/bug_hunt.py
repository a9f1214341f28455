"""Plants bugs into the real source, one at a time, and simulates until each is noticed."""

import logging
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from multiprocessing import get_context
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, override

from jaxllm.simulation.bug import Bug

STEPS_PER_RUN = 400
MAX_STEPS = 20_000
MAX_SECONDS = 60
PATCHED_ROOMS = ("jaxllm.core", "jaxllm.engine", "jaxllm.journal", "jaxllm.simulation")


@dataclass(frozen=True, slots=True)
class Catch:
    """``check`` is None if ``num_steps`` steps did not notice the bug."""

    bug: Bug
    books: bool  # were they recounted at every step?
    check: str | None
    num_steps: int
    message: str = ""


class BugNotPlantedError(Exception):
    """The text that the bug replaces is not in the source exactly once."""


def patched_source(bug: Bug) -> str:
    """Raises BugNotPlantedError: the source has changed, the bug's entry must follow."""
    spec = find_spec(bug.module)
    if spec is None or spec.origin is None:
        raise BugNotPlantedError(f"{bug.name!r}: there is no module {bug.module}.")
    source = Path(spec.origin).read_text(encoding="utf-8")
    if source.count(bug.old) != 1:
        raise BugNotPlantedError(
            f"{bug.name!r}: {bug.old!r} is in {bug.module} {source.count(bug.old)} times, not "
            "once. Bring its entry up to date."
        )
    return source.replace(bug.old, bug.new)


class _BugLoader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: str):
        super().__init__(fullname, path)
        self._source = source

    @override
    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source.encode(), self.path)  # never from, or to, a cache


class _BugFinder(MetaPathFinder):
    """Finds the module of one bug, with the bug in it."""

    def __init__(self, bug: Bug):
        self._bug = bug
        self._source = patched_source(bug)
        self._path = str(getattr(find_spec(bug.module), "origin", None))

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._bug.module:
            return None
        loader = _BugLoader(fullname, self._path, self._source)
        return spec_from_file_location(fullname, self._path, loader=loader)


def _forget_modules() -> None:
    """What is imported next is read anew, and binds to what is read anew."""
    for name in [name for name in sys.modules if name.startswith(PATCHED_ROOMS)]:
        if name not in (__name__, Bug.__module__):  # whose objects go between processes
            del sys.modules[name]


def hunt(bug: Bug, books: bool, max_steps: int = MAX_STEPS) -> Catch:
    """Simulate with the bug in place. Leaves modules with the bug behind: for a process of its own,
    or one that does nothing but hunt.
    """
    finder = _BugFinder(bug)
    _forget_modules()
    sys.meta_path.insert(0, finder)
    try:
        simulation: Any = import_module("jaxllm.simulation.simulation")
        scenarios: Any = import_module("jaxllm.simulation.scenarios")
        if not books:
            integrity: Any = import_module("jaxllm.core.integrity")
            integrity.check_integrity = lambda *args: None
        catch = Catch(bug, books, None, 0)
        names = sorted(scenarios.SCENARIOS, key=lambda name: name != bug.scenario)
        return _simulate(catch, simulation.Simulation, names, max_steps)
    finally:
        sys.meta_path.remove(finder)
        _forget_modules()


def _simulate(catch: Catch, simulation: Any, scenarios: Sequence[str], max_steps: int) -> Catch:
    logging.getLogger("jaxllm.engine").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(MAX_SECONDS)
    num_steps, seed = 0, 0
    try:
        while num_steps < max_steps:
            name = scenarios[seed // 2 % len(scenarios) if seed % 2 else 0]
            run = simulation(name, seed)
            try:
                run.run(STEPS_PER_RUN)
            except Exception as error:
                check, num_steps = noticed_by(error), num_steps + run.num_steps
                return replace(catch, check=check, num_steps=num_steps, message=str(error))
            num_steps, seed = num_steps + run.num_steps, seed + 1
        return replace(catch, num_steps=num_steps)
    finally:
        signal.alarm(0)


def _out_of_time(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"No end after {MAX_SECONDS} s.")


def noticed_by(error: Exception) -> str:
    """The check of a Violation, else the file that raised."""
    check = getattr(error, "check", None)
    return check or Path(traceback.extract_tb(error.__traceback__)[-1].filename).stem


def hunt_all(bugs: Iterable[Bug], processes: int, max_steps: int = MAX_STEPS) -> Iterator[Catch]:
    """In order. Books are recounted only for bugs that clients need not notice: what clients notice
    is noticed with books too, at the latest in the same step, because a recount changes nothing.
    """
    jobs = [(bug, not bug.answers, max_steps) for bug in bugs]
    for bug, _, _ in jobs:
        patched_source(bug)  # all that cannot be planted is told before anything runs
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(hunt, *zip(*jobs, strict=True))
