"""Processes that trace and lower programs beside this one, into the directory of lowered programs.

Tracing and lowering are Python, a second or two for a program with kernels inside: in one process
they would take longer than all compiling, which has every core. A helper that fails costs time
only, for what is not on the disk afterwards is lowered here.
"""

import logging
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from jaxllm.attention.backend import AttentionTarget
from jaxllm.config.env import host_only_environment
from jaxllm.config.plan import EnginePlan

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "jaxllm.runner.lowering_worker")
FEWEST_JOBS = 4  # for fewer a helper, which imports JAX first, comes too late
MOST_HELPERS = 8
END_GRACE_S = 5.0


@dataclass(frozen=True)
class LoweringTarget:
    """What programs are lowered for, which a helper without the device cannot see."""

    attention: AttentionTarget
    kernels: str  # the platform, as pallas_kernels names it
    jax: str  # and as JAX does: "cuda", "cpu"


class LoweringTask(msgspec.Struct, frozen=True):
    target: LoweringTarget
    plan: EnginePlan
    name: str  # of one of the plan's jobs
    path: str


class LoweringAnswer(msgspec.Struct, frozen=True):
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Shared:
    """``done`` gets every task that a helper took, and its seconds."""

    waiting: "deque[LoweringTask]"
    done: "SimpleQueue[tuple[LoweringTask, float]]"


class LoweringHelpers:
    """Owner of up to ``count`` processes, which start with the first ``share`` that is worth it."""

    def __init__(self, target: LoweringTarget, count: int):
        self._target = target
        self._count = min(count, MOST_HELPERS)
        self._processes: list[subprocess.Popen[bytes]] = []

    def share(
        self, plan: EnginePlan, wanted: Sequence[tuple[str, Path]]
    ) -> Iterator[tuple[str, float]]:
        """Names of programs, and the seconds that a helper spent on each. One that comes with 0 is
        for the caller, who takes the next of those that nobody has begun; what a helper could not
        lower is for the caller, too. ``wanted``: names and files, the longest first.
        """
        tasks = (LoweringTask(self._target, plan, name, str(path)) for name, path in wanted)
        shared = _Shared(deque(tasks), SimpleQueue())
        if len(wanted) >= FEWEST_JOBS:
            self._start(len(wanted) - 1)
        for process in self._processes:
            work = threading.Thread(target=_serve, args=(process, shared), daemon=True)
            work.start()
        for _ in wanted:
            yield _next(shared)

    def close(self) -> None:
        processes, self._processes = self._processes, []
        for process in processes:
            process.kill()  # it owns nothing: files are written whole or not at all
        for process in processes:
            process.wait(END_GRACE_S)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _start(self, most: int) -> None:
        alive = [process for process in self._processes if process.poll() is None]
        self._processes = alive
        try:
            while len(alive) < min(self._count, most):
                alive.append(
                    subprocess.Popen(
                        COMMAND,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        env=host_only_environment(),
                    )
                )
        except OSError as error:  # no memory, too many processes
            logger.warning("Programs are lowered by %d helpers: %s", len(alive), error)


def _next(shared: _Shared) -> tuple[str, float]:
    """What a helper has done, else what nobody has begun, else what a helper will have done."""
    try:
        task, seconds = shared.done.get_nowait()
    except Empty:
        try:
            task, seconds = shared.waiting.popleft(), 0.0
        except IndexError:
            task, seconds = shared.done.get()
    return task.name, seconds


def _serve(process: "subprocess.Popen[bytes]", shared: _Shared) -> None:
    """Give one helper work as long as there is some, and it lives."""
    while True:
        try:
            task = shared.waiting.popleft()
        except IndexError:
            return
        seconds = 0.0
        try:
            answer = _ask(process, task)
            seconds, problem, alive = answer.seconds, answer.error, True
        except (OSError, ValueError) as error:  # it died, was closed, or says what nobody asked
            problem, alive = f"{type(error).__name__}: {error}", False
        if problem is not None:
            logger.warning("A helper could not lower %s: %s", task.name, problem)
        shared.done.put((task, seconds))
        if not alive:
            return


def _ask(process: "subprocess.Popen[bytes]", task: LoweringTask) -> LoweringAnswer:
    """Raises OSError and ValueError (msgspec's are)."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(msgspec.json.encode(task) + b"\n")
    process.stdin.flush()
    return msgspec.json.decode(process.stdout.readline(), type=LoweringAnswer)
