"""The engine process is killed or stopped under load: everybody is told, and it comes back."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.frontend.fake_worker import DEADLY
from tests.server.command import completion, error_of, serve_command
from tests.server.sse import read_stream
from tests.server.strike import strike

pytestmark = pytest.mark.alone

LONG = ("--max-model-len", "1000000")


def test_a_killed_engine_is_told_of_and_replaced(tiny_tokenizer_dir: Path) -> None:
    with serve_command(tiny_tokenizer_dir, "paced:50", *LONG) as command:
        url = command.url()
        outcome = asyncio.run(strike(url, command, signal.SIGKILL))
        outcome.check(within=10.0)
        assert outcome.not_ready_after < 5.0
        assert outcome.ready_after < 60
        answer = httpx.post(f"{url}/v1/completions", **completion(3, stream=False))
        assert answer.json()["choices"][0]["text"] == "abc"


def test_a_stopped_engine_is_told_of_and_replaced(tiny_tokenizer_dir: Path) -> None:
    flags = (*LONG, "--step-timeout", "1")
    with serve_command(tiny_tokenizer_dir, "paced:50", *flags) as command:
        url = command.url()
        outcome = asyncio.run(strike(url, command, signal.SIGSTOP))
        outcome.check(within=1.0 + 10.0)
        assert outcome.not_ready_after < outcome.told_after[0], "late before it is given up"
        answer = httpx.post(f"{url}/v1/completions", **completion(3, stream=False))
        assert answer.json()["choices"][0]["text"] == "abc"


def test_an_engine_that_keeps_dying_ends_the_server(tiny_tokenizer_dir: Path) -> None:
    with serve_command(tiny_tokenizer_dir, "paced:50") as command:
        url = command.url()
        with httpx.Client(base_url=url, timeout=60) as http:
            for _ in range(3):
                while http.get("/health").status_code != 200:
                    time.sleep(0.02)
                (engine,) = command.engine_pids()
                os.kill(engine, signal.SIGKILL)
                while Path(f"/proc/{engine}").exists():
                    time.sleep(0.01)
        err = command.end(1)
        last = err.splitlines()[-1]
        assert last.startswith("error: The engine process died: killed by SIGKILL.")
        assert "death number 3 within 60 s" in last


def test_requests_meet_a_503_while_it_is_away(tiny_tokenizer_dir: Path) -> None:
    """Those in flight and those that come; neither is lost, neither waits."""
    with serve_command(tiny_tokenizer_dir, "paced:50") as command:
        url = command.url()

        async def run() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                waiting = asyncio.create_task(
                    http.post("/v1/completions", **completion(200, stream=False))
                )
                await asyncio.sleep(0.3)
                (engine,) = command.engine_pids()
                os.kill(engine, signal.SIGKILL)
                struck = time.monotonic()
                answers = [await waiting]
                assert time.monotonic() - struck < 10.0
                answers.append(await http.post("/v1/completions", **completion(3)))
                answers.append(await http.get("/health/ready"))
                for answer in answers:
                    assert answer.status_code == 503
                    assert error_of(answer)["code"] == "engine_unavailable"
                    assert "SIGKILL" in error_of(answer)["message"]
                    assert 5 <= int(answer.headers["retry-after"]) <= 60

        asyncio.run(run())


def test_a_deadly_request_is_not_run_a_third_time(tiny_tokenizer_dir: Path) -> None:
    """Clients that ask again by themselves must not be able to end the server."""
    worker = "tests.frontend.fake_worker"
    with serve_command(tiny_tokenizer_dir, "fake", worker=worker) as command:
        deadly = completion(5, stream=False, prompt=[DEADLY, 1])
        with httpx.Client(base_url=command.url(), timeout=60) as http:
            for _ in range(2):
                while http.get("/health").status_code != 200:
                    time.sleep(0.02)
                died = http.post("/v1/completions", **deadly)
                assert died.status_code == 503 and "exit code 9" in error_of(died)["message"]
            while http.get("/health").status_code != 200:
                time.sleep(0.02)
            refused = http.post("/v1/completions", **deadly)
            assert (refused.status_code, error_of(refused)["code"]) == (500, "request_failed")
            assert refused.headers["x-should-retry"] == "false"
            again = http.post("/v1/completions", **completion(3, stream=False))
            assert again.json()["choices"][0]["text"] == "abc"


def test_a_server_that_was_stopped_itself_blames_nobody(tiny_tokenizer_dir: Path) -> None:
    """Ctrl-Z and fg: what the engine said meanwhile has only not been read yet."""
    with serve_command(tiny_tokenizer_dir, "paced:50", "--step-timeout", "0.5") as command:
        url = command.url()
        with httpx.stream("POST", f"{url}/v1/completions", **completion(60)) as response:
            chunks = response.iter_raw()
            body = next(chunks)
            engines = command.engine_pids()
            command.process.send_signal(signal.SIGSTOP)
            time.sleep(2.0)
            command.process.send_signal(signal.SIGCONT)
            body += b"".join(chunks)
        assert read_stream(body).done
        assert command.engine_pids() == engines


def test_told_to_end_while_the_engine_is_away(tiny_tokenizer_dir: Path) -> None:
    with serve_command(tiny_tokenizer_dir, "late", worker="tests.frontend.fake_worker") as command:
        url = command.url()
        os.kill(command.engine_pids()[0], signal.SIGKILL)
        while httpx.get(f"{url}/health").status_code == 200:
            time.sleep(0.01)
        command.process.send_signal(signal.SIGTERM)
        command.end(seconds=30)


@pytest.mark.slow
def test_a_real_engine_comes_back_sooner_than_it_came(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the compilation cache that its first start has filled."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # it runs little
    flags = ("--load-format", "dummy", "--dtype", "float32", "--max-model-len", "128")
    sizes = ("--max-num-seqs", "2", "--max-num-batched-tokens", "32")
    cache = ("--num-gpu-blocks-override", "64", "--compilation-cache-dir", str(tmp_path))
    arguments = (str(tiny_model_dir), *flags, *sizes, *cache)
    started = time.monotonic()
    with serve_command(tiny_model_dir, *arguments, worker="jaxllm.worker") as command:
        url = command.url()
        first_start = time.monotonic() - started
        before = httpx.post(f"{url}/v1/completions", timeout=60, **greedy()).json()
        (engine,) = command.engine_pids()
        os.kill(engine, signal.SIGKILL)
        struck = time.monotonic()
        while httpx.get(f"{url}/health").status_code == 200:
            assert time.monotonic() - struck < 5.0
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.05)
        assert time.monotonic() - struck < first_start
        after = httpx.post(f"{url}/v1/completions", timeout=60, **greedy()).json()
        assert after["choices"][0]["text"] == before["choices"][0]["text"]


def greedy() -> dict[str, Any]:
    return completion(8, stream=False, temperature=0, ignore_eos=True)
