"""The whole command with a fake engine process: up, one answer, Ctrl-C, gone."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import functools, sys
import server.serve
from jaxllm.async_llm import AsyncLLM
from server.cli import main

worker = "tests.server.slow_worker"
server.serve.DRAIN_S = 0.5
server.serve.AsyncLLM = functools.partial(AsyncLLM, worker_module=worker)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def model() -> str:
    return "echo"


@pytest.fixture
def process(tiny_tokenizer_dir: Path, model: str) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable, "-c", PROGRAM, "serve", model, "--port", "0", "--log-level", "warning",
        "--tokenizer", str(tiny_tokenizer_dir), "--served-model-name", "fake",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"ready on (http://127\.0\.0\.1:\d+) - try: curl ", line)
    assert found, line
    return found[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [True, False])  # a terminal tells the whole group
def test_serves_and_ends_cleanly(
    process: subprocess.Popen[str], number: signal.Signals, to_group: bool
) -> None:
    url = url_of(process)
    body = {"model": "fake", "prompt": "abc", "max_tokens": 3}
    answer = httpx.post(f"{url}/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "abc"
    children = children_of(process)
    assert children
    (os.killpg if to_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=15)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out == ""
    for child in children:
        assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("max_tokens", [2, 200])  # one ends in time, one does not
def test_ctrl_c_while_a_stream_runs(process: subprocess.Popen[str], max_tokens: int) -> None:
    url = url_of(process)
    body = {"model": "fake", "prompt": "abc", "stream": True, "max_tokens": max_tokens}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        process.send_signal(signal.SIGINT)
        text = response.read().decode()
    _, err = process.communicate(timeout=15)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert text.endswith("data: [DONE]\n\n") == (max_tokens == 2)
    assert ('"error"' in text) == (max_tokens == 200)


@pytest.mark.parametrize("model", ["slow"])
def test_ctrl_c_while_the_engine_starts(process: subprocess.Popen[str]) -> None:
    while not (children := children_of(process)):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.parametrize("model", ["too-large"])
def test_an_engine_that_cannot_start(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=15)
    assert process.returncode == 3
    assert err.splitlines()[-1] == "error: The model needs 80 GiB, the device has 2 GiB."
    assert out == ""


def children_of(process: subprocess.Popen[str]) -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
