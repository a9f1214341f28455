"""Real clients in environments of their own, and the two servers that they are pointed at."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jaxllm.messages import ModelInfo
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.app import create_app
from server.protocol.limits import ConnectionLimits
from server.settings import ServerSettings
from tests.clients import rows
from tests.conftest import DEFAULT_MODEL_SIZES
from tests.server.command import ROOT, Command
from tests.server.wire import running

HOME = ROOT / ".venv-clients"
PROGRAMS = Path(__file__).parent / "programs"
MAX_MODEL_LEN: int = DEFAULT_MODEL_SIZES["max_model_len"]
MAX_NUM_SEQS: int = DEFAULT_MODEL_SIZES["max_num_seqs"]

Run = Callable[..., dict[str, Any]]


@dataclass
class Counted:
    """An application, and how often each ``X-Request-Id`` has come."""

    app: Any
    requests: Counter[str]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for name, value in scope.get("headers", ()):
            if name == b"x-request-id":
                self.requests[value.decode()] += 1
        await self.app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class FaultyServer:
    url: str
    requests: Counter[str]


@pytest.fixture(scope="session")
def faulty(tiny_tokenizer_dir: Path) -> Iterator[FaultyServer]:
    """A server over an engine that fails as ``rows`` says, with a key and small limits."""
    info = ModelInfo("org/fake", str(tiny_tokenizer_dir), 256, 258, (257,))
    engine = rows.FaultyEngine(Tokenizer.from_dir(tiny_tokenizer_dir), info)
    engine.step_seconds = 0.005
    settings = ServerSettings(
        served_model_names=(rows.MODEL,),
        api_keys=(rows.KEY,),
        allowed_hosts=("127.0.0.1",),
        max_body_bytes=rows.MAX_BODY_BYTES,
        access_log="off",
    )
    counted = Counted(create_app(engine, settings), Counter())
    limits = ConnectionLimits(max_body_bytes=rows.MAX_BODY_BYTES)
    with running(counted, limits) as port:
        yield FaultyServer(f"http://127.0.0.1:{port}/v1", counted.requests)


@contextmanager
def default_server(log: Path, *flags: str) -> Iterator[str]:
    """URL of ``jaxllm serve`` with the default model, in float32."""
    sizes = [
        word
        for name, value in DEFAULT_MODEL_SIZES.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    with log.open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--port", "0", *sizes, *flags],
            cwd=ROOT,
            env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            yield Command(process, errors).url()
        finally:
            process.terminate()
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


@pytest.fixture(scope="session")
def default_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with default_server(tmp_path_factory.mktemp("serve") / "log", "--enable-embeddings") as url:
        yield url


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a program of ``programs`` in its client's environment: JSON in, JSON out."""

    def run_program(program: str, environment: str, **given: Any) -> dict[str, Any]:
        need_clients()
        source = PROGRAMS / program
        if environment == "node":
            if not (HOME / "node").exists():
                pytest.skip("no npm on this machine")
            command = ["node", str(source)]
        else:
            command = [str(HOME / environment / "bin" / "python"), str(source)]
        done = subprocess.run(
            command,
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=HOME,
            env=quiet_environment(),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run_program


def need_clients() -> None:
    """They are not installed with everything else; whoever tests one room can do without."""
    if not (HOME / "complete").exists():
        pytest.skip("no real clients here: run scripts/clients.sh first")


def quiet_environment() -> dict[str, str]:
    """Without this test run's Python path, and with clients that ask nobody else anything."""
    dropped = ("PYTHON", "OPENAI", "JAX")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "NO_PROXY": "127.0.0.1",
    }
