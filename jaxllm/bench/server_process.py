"""``jaxllm serve`` in a process of its own: started, awaited, ended. Knows it from outside only."""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import IO, Any

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import EngineDeadError

READY_LINE = re.compile(r"^jaxllm: ready on (\S+)")
SUMMARY_LINE = re.compile(r"Engine \d+ is ready: (\{.*\})$", re.MULTILINE)
PROGRAMS_LINE = re.compile(r"Seconds of lowering and compiling: (\{.*\})$", re.MULTILINE)
STOP_GRACE_S = 20.0

# -P: no server.py that happens to lie in the working directory is taken for ours.
COMMAND = (sys.executable, "-P", "-m", "server", "serve")


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """One that is ready. ``summary`` is the engine's own, from the server's log, and so is
    ``program_seconds``: of lowering and of compiling, by name of those that took long.
    """

    url: str
    started: float  # time.perf_counter() just before the process was made
    ready_seconds: float
    summary: dict[str, Any]
    program_seconds: dict[str, list[float]]


def flags_of(config: EngineConfig) -> list[str]:
    """The command line that gives ``config``: the model and what differs from its defaults."""
    flags = [config.model]
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name == "model" or value == item.default:
            continue
        name = item.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name}")
        elif isinstance(value, tuple):
            flags += [f"--{name}={one}" for one in value]
        else:
            flags.append(f"--{name}={value}")
    return flags


@contextmanager
def server_process(
    config: EngineConfig, *, timeout_s: float, command: Sequence[str] = COMMAND
) -> Generator[ServerProcess]:
    """A server on a free port of this machine until the ``with`` ends.

    Raises:
        EngineDeadError: it ended before it was ready, or was not ready in time; its last words
            are in the message.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, *flags_of(config), "--port=0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            url = _wait_until_ready(process, timeout_s, log)
            ready = time.perf_counter() - started
            told = (_told(log, line) for line in (SUMMARY_LINE, PROGRAMS_LINE))
            yield ServerProcess(url, started, ready, *told)
        finally:
            _end(process)


def _wait_until_ready(process: subprocess.Popen[str], timeout_s: float, log: IO[str]) -> str:
    assert process.stdout is not None
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()  # which ends the loop below

    timer = threading.Timer(timeout_s, give_up)
    timer.start()
    try:
        for line in process.stdout:
            if found := READY_LINE.match(line):
                return found[1]
    finally:
        timer.cancel()
    why = f"was not ready within {timeout_s:g} s" if late.is_set() else "ended before it was ready"
    log.seek(0)
    words = [line.strip() for line in log if line.strip()]
    last = words[-1].removeprefix("error: ") if words else "It said nothing."
    raise EngineDeadError(f"The server {why}: {last}")


def _told(log: IO[str], line: re.Pattern[str]) -> dict[str, Any]:
    """The JSON that the last such line holds."""
    log.seek(0)
    found = line.findall(log.read())
    log.seek(0, 2)
    return json.loads(found[-1]) if found else {}


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
