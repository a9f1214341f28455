"""The whole command with a fake engine process: up, one answer, Ctrl-C, gone."""

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.server.command import completion, serve_command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [True, False])  # a terminal tells the whole group
def test_serves_and_ends_cleanly(
    tiny_tokenizer_dir: Path, number: signal.Signals, to_group: bool
) -> None:
    with serve_command(tiny_tokenizer_dir) as command:
        url = command.url()
        answer = httpx.post(f"{url}/v1/completions", **completion(3, stream=False)).json()
        assert answer["choices"][0]["text"] == "abc"
        engines = command.engine_pids()
        assert engines
        (os.killpg if to_group else os.kill)(command.process.pid, number)
        command.end()
        assert not any(map(exists, engines))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_while_the_engine_starts(
    tiny_tokenizer_dir: Path, number: signal.Signals
) -> None:
    with serve_command(tiny_tokenizer_dir, "slow") as command:
        while not (engines := command.engine_pids()):
            assert command.process.poll() is None
            time.sleep(0.02)
        os.killpg(command.process.pid, number)
        command.end()
        assert not any(map(exists, engines))


def test_an_engine_that_cannot_start(tiny_tokenizer_dir: Path) -> None:
    with serve_command(tiny_tokenizer_dir, "too-large") as command:
        err = command.end(3)
        assert err.splitlines()[-1] == "error: The model needs 80 GiB, the device has 2 GiB."


def exists(pid: int) -> bool:
    """A zombie has ended: whoever adopted it is slow to say so."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
