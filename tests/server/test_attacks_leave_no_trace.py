"""Every attack on the whole command, over and over: the same processes, no larger than before."""

from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.command import Command, completion, serve_command
from tests.server.test_attack_classes import SENDS, post
from tests.server.test_live import wait_until

FLAGS = ("--max-model-len", "128", "--max-num-seqs", "8", "--max-body-bytes", str(8 * 2**20))
MOST_ROUNDS = 10
QUIET_ROUNDS = 2  # allocators take what one round needs, once; a leak takes it in every round
GROWTH = 4 * 2**20  # bytes a round
SPARE_FILES = 3  # opened on first use


def attack(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:
        for make in SENDS.values():
            for send in make():
                assert post(http, send).status_code < 500


def processes(command: Command) -> list[psutil.Process]:
    """The server and its engine; equal when they are the same, not only their numbers."""
    return list(map(psutil.Process, (command.process.pid, *command.engine_pids())))


def sizes(found: list[psutil.Process]) -> list[int]:
    return [process.memory_info().rss for process in found]


def num_files(found: list[psutil.Process]) -> int:
    return sum(process.num_fds() for process in found)


@pytest.mark.slow
def test_the_same_processes_and_no_larger(tiny_tokenizer_dir: Path) -> None:
    worker = "tests.frontend.fake_worker"
    with serve_command(tiny_tokenizer_dir, "fake", *FLAGS, worker=worker) as command:
        url = command.url()
        found = processes(command)
        most_files = num_files(found) + SPARE_FILES
        quiet, grown = 0, [0]
        for _ in range(MOST_ROUNDS):
            before = sizes(found)
            attack(url)
            assert processes(command) == found
            wait_until(lambda: num_files(found) <= most_files)
            grown = [now - then for now, then in zip(sizes(found), before, strict=True)]
            quiet = quiet + 1 if max(grown) < GROWTH else 0
            if quiet == QUIET_ROUNDS:
                break
        assert quiet == QUIET_ROUNDS, f"still growing by {grown} bytes a round"
        answer = httpx.post(f"{url}/v1/completions", timeout=60, **completion(3, stream=False))
        assert answer.json()["choices"][0]["text"] == "abc"
