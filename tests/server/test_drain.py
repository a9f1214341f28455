"""SIGTERM and Ctrl-C: what runs may finish, what comes is refused, and it ends in time."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.command import Command, completion, error_of, serve_command
from tests.server.sse import Stream, read_stream

pytestmark = pytest.mark.alone


class Streaming:
    """One stream, read by a thread from its first byte on."""

    def __init__(self, url: str, max_tokens: int):
        self.begun = threading.Event()
        self.ended_at = 0.0
        self._body = b""
        self._thread = threading.Thread(target=self._read, args=(url, max_tokens))
        self._thread.start()
        assert self.begun.wait(30)

    def _read(self, url: str, max_tokens: int) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", **completion(max_tokens)) as response:
            for chunk in response.iter_raw():
                self._body += chunk
                self.begun.set()
        self.ended_at = time.monotonic()

    def result(self, seconds: float = 30) -> Stream:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "it hangs"
        return read_stream(self._body)


@contextmanager
def draining(
    tokenizer_dir: Path, max_tokens: int, seconds: float
) -> Iterator[tuple[Command, str, Streaming]]:
    """A server that was told to end while a stream runs."""
    with serve_command(tokenizer_dir, "paced:100", "--drain-timeout", str(seconds)) as command:
        url = command.url()
        stream = Streaming(url, max_tokens)
        with httpx.Client(base_url=url) as http:
            http.get("/health")
            command.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx.TransportError):  # a busy machine may come too late
                while http.get("/health/ready").status_code == 200:
                    time.sleep(0.01)
        yield command, url, stream


def test_what_runs_finishes_and_what_comes_is_refused(tiny_tokenizer_dir: Path) -> None:
    with draining(tiny_tokenizer_dir, 15, 20.0) as (command, url, stream):
        for path in ("/health", "/health/ready"):
            answer = httpx.get(f"{url}{path}")
            assert answer.status_code == 503
            assert error_of(answer)["message"] == "The server is shutting down."
        assert httpx.get(f"{url}/health/live").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 200
        for path in ("/v1/completions", "/v1/chat/completions"):
            refused = httpx.post(f"{url}{path}", **completion(1))
            assert refused.status_code == 503
            assert error_of(refused)["code"] == "engine_unavailable"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert command.process.poll() is None
        assert stream.result().done
        command.end()


def test_what_does_not_finish_in_time_ends_with_an_error(tiny_tokenizer_dir: Path) -> None:
    with draining(tiny_tokenizer_dir, 200, 0.5) as (command, _, stream):
        told = stream.result()
        assert told.error is not None and told.error["code"] == "engine_unavailable"
        assert "1 requests end with an error" in command.end()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_second_signal_ends_it_at_once(tiny_tokenizer_dir: Path, stopped: bool) -> None:
    """Even with an engine that does not answer; and the stream is told all the same."""
    with draining(tiny_tokenizer_dir, 200, 60.0) as (command, _, stream):
        (engine,) = command.engine_pids()
        if stopped:
            os.kill(engine, signal.SIGSTOP)
        command.process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        told = stream.result()
        assert told.error is not None and stream.ended_at - asked < 10.0
        command.end(seconds=30)
        assert not Path(f"/proc/{engine}").exists()


def test_a_whole_answer_that_is_cut_short_is_a_503(tiny_tokenizer_dir: Path) -> None:
    flags = ("--drain-timeout", "0.3")
    with serve_command(tiny_tokenizer_dir, "paced:100", *flags) as command:
        url = command.url()
        timer = threading.Timer(0.5, command.process.send_signal, (signal.SIGTERM,))
        timer.start()
        answer = httpx.post(f"{url}/v1/completions", **completion(200, stream=False))
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")
        assert "retry-after" in answer.headers
        command.end()


@pytest.mark.parametrize("twice", [False, True])
def test_a_client_that_does_not_read_does_not_hold_it_up(
    tiny_tokenizer_dir: Path, twice: bool
) -> None:
    flags = ("--drain-timeout", "60" if twice else "0.2", "--max-model-len", "1000000")
    with serve_command(tiny_tokenizer_dir, "paced:0.1", *flags) as command:
        url = command.url()
        with httpx.stream("POST", f"{url}/v1/completions", **completion(900_000)):
            time.sleep(1.0)  # until no more fits between server and client
            for _ in range(1 + twice):
                command.process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
            command.process.wait(30)
        assert command.process.returncode == 0
