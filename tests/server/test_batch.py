"""``jaxllm run-batch``: the format, going on after an end of any kind, bounds, retries."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from jaxllm.bench.http_client import HTTPError
from jaxllm.errors import QueueFullError
from server import cli
from server.app import create_app
from server.client import batch
from server.client.batch_file import OutputFile
from server.settings import ServerSettings
from tests.server.fake_client import ANSWER, FakeClient
from tests.server.wire import running

ROOT = Path(__file__).parents[2]
Run = Callable[..., int]


@pytest.fixture
def url(engine: FakeClient) -> Iterator[str]:
    with running(create_app(engine, ServerSettings(served_model_names=("fake",)))) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


@pytest.fixture
def run(url: str, paths: tuple[Path, Path]) -> Run:
    def run(*lines: Any, flags: tuple[str, ...] = ()) -> int:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        paths[0].write_text("\n".join(texts))
        return cli.main(["run-batch", *map(str, paths), "--url", url, *flags])

    return run


def line(custom_id: Any, **body: Any) -> dict[str, Any]:
    body = {"model": "fake", "prompt": "abc"} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def results(paths: tuple[Path, Path]) -> dict[str | None, dict[str, Any]]:
    return {result["custom_id"]: result for result in map(json.loads, lines(paths))}


def lines(paths: tuple[Path, Path]) -> list[str]:
    text = paths[1].read_text()
    assert text == "" or text.endswith("\n")
    return text.splitlines()


def test_three_kinds_of_requests(run: Run, paths: tuple[Path, Path], engine: FakeClient) -> None:
    chat = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
    requests = [
        line("one", n=2),
        line("two") | {"url": "/v1/chat/completions", "body": chat},
        line("three") | {"url": "/v1/embeddings", "body": {"model": "fake", "input": "x"}},
    ]
    assert run(*requests) == 1  # the model has no embeddings
    got = results(paths)
    assert set(got) == {"one", "two", "three"}
    for result in got.values():
        assert set(result) == {"id", "custom_id", "response", "error"}
        assert set(result["response"]) == {"status_code", "request_id", "body"}
        assert result["id"].startswith("batch_req_") and result["error"] is None
        assert result["response"]["request_id"].startswith("req_")
    assert [c["text"] for c in got["one"]["response"]["body"]["choices"]] == [ANSWER, ANSWER]
    message = got["two"]["response"]["body"]["choices"][0]["message"]
    assert message["content"] == ANSWER
    assert got["three"]["response"]["status_code"] == 400
    assert got["three"]["response"]["body"]["error"]["message"]


BAD: list[tuple[Any, str | None, str]] = [
    ("nonsense", None, "could not parse"),
    ('{"custom_id": "x", NaN}', None, "could not parse"),
    ("[" * 100 + "]" * 100, None, "nested more than"),
    ([1, 2], None, "expected an object"),
    (line(None), None, "Invalid type for 'custom_id'"),
    (line(""), None, "custom_id"),
    ({"method": "POST", "url": "/v1/completions", "body": {}}, None, "Missing required"),
    (line("x") | {"method": "GET"}, "x", "Supported values are: 'POST'"),
    (line("x") | {"url": "/metrics"}, "x", "Supported values are: '/v1/chat/completions'"),
    (line("x") | {"url": "http://elsewhere/v1/completions"}, "x", "Supported values are"),
    (line("x") | {"body": "text"}, "x", "Invalid type for 'body'"),
    (line("x", stream=True), "x", "cannot be streamed"),
    (line("ok"), None, "earlier line's"),
]


def test_bad_lines_become_error_lines(
    run: Run, paths: tuple[Path, Path], engine: FakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    for bad, custom_id, message in BAD:
        paths[1].unlink(missing_ok=True)
        for _ in range(2):  # the second time nothing is left to do
            assert run(line("ok"), "", bad) == 1
            got = [json.loads(text) for text in lines(paths)]
            assert len(got) == 2, bad
            (wrong,) = [result for result in got if result["response"] is None]
            assert wrong["custom_id"] == custom_id
            assert message in wrong["error"]["message"], wrong
            assert wrong["error"]["line"] == 3 and wrong["error"]["code"]
        assert capsys.readouterr().err.count("1 of 2 lines failed.") == 2
    assert len(engine.prompts) == len(BAD)


def test_a_body_is_checked_as_the_server_does(
    run: Run, paths: tuple[Path, Path], engine: FakeClient
) -> None:
    wrong = [{"temperature": -1}, {"n": "two"}, {"model": "other"}, {"seed": 10**40}]
    assert run(*(line(str(i), **body) for i, body in enumerate(wrong))) == 1
    got = results(paths)
    answers = [got[str(i)]["response"] for i in range(len(wrong))]
    assert [answer["status_code"] for answer in answers] == [400, 400, 404, 400]
    params = [answer["body"]["error"]["param"] for answer in answers]
    assert params == ["temperature", "n", "model", "seed"]
    assert not engine.prompts


def test_it_goes_on_where_it_was(run: Run, paths: tuple[Path, Path], engine: FakeClient) -> None:
    requests = [line(str(i)) for i in range(6)]
    assert run(*requests[:3]) == 0
    before = lines(paths)
    assert run(*requests) == 0
    assert lines(paths)[:3] == before
    assert set(results(paths)) == {str(i) for i in range(6)}
    assert len(engine.prompts) == 6
    assert run(*requests) == 0
    assert len(engine.prompts) == 6


@pytest.mark.parametrize("cut", [1, 5, 40, -1, -2, -30])
def test_a_torn_last_line_is_repaired(
    run: Run, paths: tuple[Path, Path], engine: FakeClient, cut: int
) -> None:
    assert run(line("a")) == 0
    first = paths[1].read_bytes()
    assert run(line("a"), line("b")) == 0
    second = paths[1].read_bytes()[len(first) :]
    paths[1].write_bytes(first + second[:cut])
    assert run(line("a"), line("b")) == 0
    assert len(lines(paths)) == 2
    assert set(results(paths)) == {"a", "b"}
    assert len(engine.prompts) == (2 if cut == -1 else 3)  # only its end was missing


@pytest.mark.parametrize(
    "content", [b"my thesis", b"my thesis\n", b'{"a": 1}\n', b'{"id": 3}\n', b"\xff\n", b"\0\0",
     b'{"id": "batch_req_1", "custom_id": null, "response": null}\n'],
)  # fmt: skip
def test_other_files_are_left_alone(run: Run, paths: tuple[Path, Path], content: bytes) -> None:
    paths[1].write_bytes(content)
    assert run(line("a")) == 2
    assert paths[1].read_bytes() == content


def test_files_that_cannot_be_used(
    run: Run, paths: tuple[Path, Path], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = map(str, paths)
    flags = ["--url", url]
    assert cli.main(["run-batch", source, target, *flags]) == 2
    assert cli.main(["run-batch", str(ROOT), target, *flags]) == 2
    paths[0].write_text(json.dumps(line("a")))
    assert cli.main(["run-batch", source, str(ROOT), *flags]) == 2
    assert cli.main(["run-batch", source, source, *flags]) == 2
    with OutputFile(paths[1]):
        assert cli.main(["run-batch", source, target, *flags]) == 2
        assert "another run-batch" in capsys.readouterr().err
    assert cli.main(["run-batch", source, target, "fake", *flags]) == 2
    assert cli.main(["run-batch", source, target, "--max-concurrency", "0", *flags]) == 2
    assert cli.main(["run-batch", source, target, "--url", "http://127.0.0.1:9"]) == 2
    assert paths[1].read_text() == ""


def test_no_more_at_once_than_allowed(
    run: Run, paths: tuple[Path, Path], engine: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    token = FakeClient._token

    def noting(self: FakeClient, *args: Any) -> Any:
        nonlocal most
        most = max(most, self.num_running)
        return token(self, *args)

    monkeypatch.setattr(FakeClient, "_token", noting)
    engine.step_seconds = 0.002
    assert run(*(line(str(i)) for i in range(20)), flags=("--max-concurrency", "4")) == 0
    assert most == 4
    assert len(results(paths)) == 20


class Moody:
    """An endpoint of which the first answers are given: a status, or an error."""

    model = "fake"

    def __init__(self, *moods: int | Exception):
        self.moods = list(moods)
        self.asked = 0

    @asynccontextmanager
    async def post(self, route: str, body: Mapping[str, Any]) -> AsyncGenerator["Reply"]:
        self.asked += 1
        mood = self.moods.pop(0) if self.moods else 200
        if isinstance(mood, Exception):
            raise mood
        yield Reply(mood)


class Reply:
    def __init__(self, status: int):
        self.status = status
        self.headers = {"retry-after": "7"} if status == 429 else {}

    async def parts(self) -> AsyncGenerator[bytes]:
        yield b'{"error": {"message": "no"}}' if self.status != 200 else b"not JSON"


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> tuple[Moody, list[float]]:
    endpoint, pauses = Moody(), list[float]()

    async def connect(url: str, model: str | None) -> Moody:
        return endpoint

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(batch, "connect", connect)
    monkeypatch.setattr(batch.asyncio, "sleep", sleep)
    monkeypatch.setattr(batch.random, "uniform", lambda low, high: 1.0)
    return endpoint, pauses


def test_a_busy_server_is_asked_again(
    run: Run, paths: tuple[Path, Path], moody: tuple[Moody, list[float]]
) -> None:
    endpoint, pauses = moody
    endpoint.moods = [503, 429, HTTPError("cut off"), ConnectionRefusedError(), 502]
    assert run(line("a")) == 0
    assert pauses == [0.5, 7.0, 2.0, 4.0, 8.0]
    assert results(paths)["a"]["response"]["body"] == "not JSON"


@pytest.mark.parametrize(("status", "tries"), [(503, batch.MAX_TRIES), (401, 1), (403, 1)])
def test_what_says_nothing_about_a_request_is_no_result(
    run: Run,
    paths: tuple[Path, Path],
    moody: tuple[Moody, list[float]],
    status: int,
    tries: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    endpoint, pauses = moody
    endpoint.moods += [200, *[status] * 100]
    flags = ("--max-concurrency", "1")
    assert run(line("a"), line("b"), line("c"), flags=flags) == 1
    assert endpoint.asked == 1 + tries
    assert len(pauses) == tries - 1
    assert set(results(paths)) == {"a"}
    assert capsys.readouterr().err.startswith("error: ")
    endpoint.moods.clear()
    assert run(line("a"), line("b"), line("c"), flags=flags) == 0
    assert set(results(paths)) == {"a", "b", "c"}


def test_a_server_whose_queue_is_full(
    run: Run, paths: tuple[Path, Path], engine: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.fail_with = QueueFullError("Too many wait.")

    async def sleep(seconds: float) -> None:
        engine.fail_with = None  # by now it has room

    monkeypatch.setattr(batch, "asyncio", type("Asyncio", (), {**vars(asyncio), "sleep": sleep}))
    assert run(line("a")) == 0
    assert len(engine.prompts) == 2


_LOCAL = """
import functools, sys
import server.client.endpoint as endpoint
from server.cli import main

worker = "tests.fakes.paced_worker"
endpoint.AsyncLLM = functools.partial(endpoint.AsyncLLM, worker_module=worker)
sys.exit(main(sys.argv[1:]))
"""


def test_killed_and_started_again_over_a_local_model(
    paths: tuple[Path, Path], tiny_tokenizer_dir: Path
) -> None:
    """An engine process of its own; kill -9 in the middle; the second run does the rest."""
    count = 60
    requests = [line(f"{i}", prompt=chr(97 + i % 26), max_tokens=3) for i in range(count)]
    paths[0].write_text("\n".join(map(json.dumps, requests)))
    command = [
        sys.executable, "-c", _LOCAL, "run-batch", *map(str, paths), "paced:20",
        "--tokenizer", str(tiny_tokenizer_dir), "--served-model-name", "fake",
        "--max-concurrency", "4",
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not paths[1].exists() or paths[1].stat().st_size < 2000:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = paths[1].read_bytes().count(b"\n")
    assert 0 < done < count
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert second.returncode == 0, second.stderr
    assert f"0 of {count} lines failed." in second.stderr
    assert len(lines(paths)) == count
    for i, result in results(paths).items():
        text = result["response"]["body"]["choices"][0]["text"]
        assert text == chr(97 + int(i or 0) % 26) * 3
