"""``jaxllm serve`` as a process of its own, over a fake engine process or a real one."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

ROOT = Path(__file__).parents[2]
PROGRAM = """
import functools, sys
import server.serve
from jaxllm.async_llm import AsyncLLM
from server.cli import main

server.serve.FORCE_S = 1
server.serve.AsyncLLM = functools.partial(AsyncLLM, worker_module=sys.argv[1])
sys.exit(main(["serve", *sys.argv[2:]]))
"""


@dataclass
class Command:
    process: subprocess.Popen[str]
    log: IO[str]  # a file: a full pipe would hold up the server

    def url(self) -> str:
        """Waits until it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"ready on (http://127\.0\.0\.1:\d+) - try: curl ", line)
        assert found, line
        return found[1]

    def engine_pids(self) -> list[int]:
        pid = self.process.pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def end(self, code: int = 0, *, seconds: float = 60) -> str:
        """Wait for the end, check it, return what was logged."""
        out, _ = self.process.communicate(timeout=seconds)
        self.log.seek(0)
        err = self.log.read()
        assert self.process.returncode == code, err
        assert "Traceback" not in err, err
        assert out == ""
        return err


@contextmanager
def serve_command(
    tokenizer_dir: Path | None,
    model: str = "paced:100",
    *flags: str,
    worker: str = "tests.fakes.paced_worker",
) -> Iterator[Command]:
    """``paced:100`` gives every stream ten tokens a second; a real model has its own tokenizer."""
    command = [
        sys.executable, "-c", PROGRAM, worker, model, "--port", "0", "--log-level", "warning",
        "--served-model-name", "fake", *flags,
    ]  # fmt: skip
    if tokenizer_dir is not None:
        command += ["--tokenizer", str(tokenizer_dir)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            yield Command(process, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def completion(max_tokens: int, *, stream: bool = True, **more: Any) -> dict[str, Any]:
    """Arguments for httpx's ``post`` and ``stream``."""
    body = {"model": "fake", "prompt": "abc", "max_tokens": max_tokens, "stream": stream}
    return {"content": json.dumps(body | more), "headers": {"content-type": "application/json"}}


def error_of(response: httpx.Response) -> dict[str, Any]:
    return response.json()["error"]
