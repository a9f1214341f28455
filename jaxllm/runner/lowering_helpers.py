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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from jaxllm.attention.backend import AttentionTarget
from jaxllm.config.env import host_only_environment
from jaxllm.config.plan import EnginePlan

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "jaxllm.runner.lowering_worker")
FEWEST_JOBS = 4  # for fewer a helper, which imports JAX first, comes too late
MOST_HELPERS = 8
PATIENCE_S = 120.0  # with a helper, when there is nothing else to be lowered
END_GRACE_S = 5.0
# Of a program that a helper has lowered, or could not: its name, and the seconds it took (or 0).
Done = Callable[[str, float], None]


@dataclass(frozen=True)
class LoweringTarget:
    """What programs are lowered for, which a helper without the device cannot see."""

    attention: AttentionTarget
    kernels: str  # the platform, as pallas_kernels names it
    jax: str  # and as JAX does: "cuda", "cpu"
    settings: tuple[tuple[str, str | bool | None], ...]  # of JAX, by lowering_cache.jax_settings


class LoweringTask(msgspec.Struct, frozen=True):
    target: LoweringTarget
    plan: EnginePlan
    name: str  # of one of the plan's jobs
    path: str


class LoweringAnswer(msgspec.Struct, frozen=True):
    seconds: float
    error: str | None = None


class LoweringHelpers:
    """Owner of up to ``count`` processes, which start with the first ``share`` that is worth it."""

    def __init__(self, target: LoweringTarget, count: int):
        self._target = target
        self._count = min(count, MOST_HELPERS)
        self._processes: list[subprocess.Popen[bytes]] = []

    def share(
        self, plan: EnginePlan, wanted: Sequence[tuple[str, Path]], done: Done
    ) -> Iterator[str]:
        """Names of the programs that the caller is to lower, who takes them one by one as helpers
        do; ``done`` is called for all others, in threads, and every call is over in the end.
        ``wanted``: names and files, what takes longest first.
        """
        self._processes = [process for process in self._processes if process.poll() is None]
        tasks = (LoweringTask(self._target, plan, name, str(path)) for name, path in wanted)
        waiting = deque(tasks)
        if len(wanted) >= FEWEST_JOBS:
            self._start(len(wanted) - 1)
        threads = [
            threading.Thread(target=_serve, args=(process, waiting, done), daemon=True)
            for process in self._processes
        ]
        for thread in threads:
            thread.start()
        try:
            while (task := _next(waiting)) is not None:
                yield task.name
        finally:
            waiting.clear()  # where the caller has failed, nobody needs the rest
            for thread, process in zip(threads, self._processes, strict=True):
                thread.join(PATIENCE_S)
                if thread.is_alive():
                    process.kill()
                    thread.join()

    def close(self) -> None:
        processes, self._processes = self._processes, []
        for process in processes:
            process.kill()  # it owns nothing: files are written whole or not at all
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_GRACE_S)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what it was not told before it died
                        pipe.close()

    def _start(self, most: int) -> None:
        alive = self._processes
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


def _next(waiting: deque[LoweringTask]) -> LoweringTask | None:
    try:
        return waiting.popleft()
    except IndexError:  # another thread has taken the last
        return None


def _serve(process: "subprocess.Popen[bytes]", waiting: deque[LoweringTask], done: Done) -> None:
    """Give one helper work as long as there is some, and it lives."""
    alive = True
    while alive and (task := _next(waiting)) is not None:
        seconds = 0.0
        try:
            answer = _ask(process, task)
            seconds, problem = answer.seconds, answer.error
        except (OSError, ValueError) as error:  # it died, was closed, or says what nobody asked
            problem, alive = f"{type(error).__name__}: {error}", False
        if problem is not None:
            logger.warning("A helper could not lower %s: %s", task.name, problem)
        done(task.name, seconds)


def _ask(process: "subprocess.Popen[bytes]", task: LoweringTask) -> LoweringAnswer:
    """Raises OSError and ValueError (msgspec's are)."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(msgspec.json.encode(task) + b"\n")
    process.stdin.flush()
    return msgspec.json.decode(process.stdout.readline(), type=LoweringAnswer)
