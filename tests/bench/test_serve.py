"""``jaxllm bench serve`` against a server that is scripted byte by byte."""

import asyncio
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jaxllm.bench.goodput import Goodput
from jaxllm.bench.http_client import BaseURL
from jaxllm.bench.request_record import RequestRecord, record_request
from jaxllm.bench.serve import ServeBenchOptions, arrival_delays, run_serve
from jaxllm.bench.serve_summary import summarize
from jaxllm.errors import ConfigError, RequestFailedError
from server import cli
from tests.bench.fake_server import (
    STREAM_HEAD,
    Pieces,
    chunked,
    event,
    fake_server,
    head,
    json_answer,
    tokens,
)

ROUTE = "/v1/completions"
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def text(value: str, reason: str | None = None) -> bytes:
    return event({"choices": [{"text": value, "finish_reason": reason}]})


def record(pieces: Pieces, **options: Any) -> RequestRecord:
    with fake_server(lambda path, body: pieces) as server:
        base = BaseURL.parse(server.url)
        return asyncio.run(record_request(base, ROUTE, {"max_tokens": 2}, {}, **options))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_report(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLLM_API_KEY", "secret")
    path = tmp_path / "serve.json"
    with fake_server() as server:
        options = ServeBenchOptions(
            base_url=f"{server.url}/v1/",
            endpoint=endpoint,
            num_prompts=6,
            input_len=5,
            output_len=4,
            max_concurrency=2,
            ignore_eos=True,
            vocab_size=100,
            goodput=("ttft:60000", "e2e:60000"),
            json_path=path,
        )
        report = run_serve(options)
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert (report["completed"], report["failed"], report["failures"]) == (6, 0, {})
    assert (report["output_tokens"], report["prompt_tokens"]) == (24, 42)
    assert report["tokens_counted_by"] == "usage"
    assert report["goodput"]["met"] == 6
    assert report["model"] == "fake" and "secret" not in path.read_text()
    assert server.most_at_once <= 2
    posts = [item for item in server.requests if "models" not in item[0]]
    assert len(posts) == 7  # one to see that it works
    for route, headers, body in posts:
        assert route == ("/v1/chat/completions" if endpoint == "chat" else ROUTE)
        assert headers["authorization"] == "Bearer secret"
        assert body["stream"] is body["stream_options"]["include_usage"] is body["ignore_eos"]
        assert body["temperature"] == 0 and body["max_tokens"] in (1, 4)
        if endpoint == "chat":
            assert len(body["messages"][0]["content"].split()) == 5
        else:
            assert len(body["prompt"]) == 5 and max(body["prompt"]) < 100


def test_times() -> None:
    with fake_server(lambda path, body: tokens(path, body, gap=0.05)) as server:
        base = BaseURL.parse(server.url)
        body = {"max_tokens": 4}
        got = asyncio.run(record_request(base, ROUTE, body, {}, expected_tokens=4))
    assert got.failure is None and got.num_output_tokens == 4
    assert 0.045 <= got.ttft < got.e2e
    assert len(got.itl) == 3 and min(got.itl) > 0.02 and sum(got.itl) > 0.13
    assert got.tpot == pytest.approx((got.e2e - got.ttft) / 3)


def test_the_role_is_no_token() -> None:
    def chat(path: str, body: dict[str, Any]) -> Pieces:
        return tokens("chat", {"max_tokens": 1}, gap=0.1)

    with fake_server(chat) as server:
        base = BaseURL.parse(server.url)
        got = asyncio.run(record_request(base, ROUTE, {}, {}))
    assert got.ttft >= 0.09 and len(got.chunk_times) == 1


@pytest.mark.parametrize(
    ("pieces", "failure"),
    [
        (json_answer({"error": {"code": "server_overloaded"}}, 429), "HTTP 429: server_overloaded"),
        ([head(503, content_length="0")], "HTTP 503"),
        ([STREAM_HEAD, chunked(text("a"), event({"error": {"code": "dead"}})), END],
         "error event: dead"),
        ([STREAM_HEAD, chunked(text("a")), END], "stream ended without [DONE]"),
        ([STREAM_HEAD, chunked(text("a"))], "the answer was cut off"),
        ([STREAM_HEAD, b"50\r\ndata"], "the answer was cut off"),
        ([STREAM_HEAD, b"zz\r\n"], "the answer was cut off"),
        ([STREAM_HEAD, chunked(DONE), END], "no choices"),
        ([STREAM_HEAD, chunked(b"data: {\n\n", DONE), END], "not JSON"),
        ([STREAM_HEAD, chunked(b"data: 1\n\n", DONE), END], "not a chunk"),
        ([b"SSH-2.0\r\n\r\n"], "does not speak HTTP"),
        ([], "closed without an answer"),
        ([STREAM_HEAD, 30.0], "timeout"),
        (tokens("", {"max_tokens": 3}), "wrong number of tokens"),
    ],
)  # fmt: skip
def test_failures_by_kind(pieces: Pieces, failure: str) -> None:
    got = record(pieces, expected_tokens=2, timeout_s=0.5)
    assert got.failure is not None and failure in got.failure


@pytest.mark.parametrize("where", ["length", "close"])
def test_bodies_that_are_not_chunked(where: str) -> None:
    body = text("a") + text("", "stop") + DONE
    first = head(content_length=str(len(body))) if where == "length" else head()
    got = record([first, body[:9], 0.01, body[9:]])
    assert got.failure is None and len(got.chunk_times) == 1


def test_tokens_without_text_have_a_first_token() -> None:
    got = record([STREAM_HEAD, chunked(text("", "length"), DONE), END])
    assert got.failure is None and got.ttft == got.e2e and got.tpot is None


def test_nobody_there() -> None:
    with fake_server() as server:
        url = server.url
    got = asyncio.run(record_request(BaseURL.parse(url), ROUTE, {}, {}))
    assert got.failure is not None and got.failure.startswith("connection: ")
    with pytest.raises(ConfigError, match="no server at"):
        run_serve(ServeBenchOptions(base_url=url, num_prompts=1))


def test_failed_requests_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    served = 0

    def every_other(path: str, body: dict[str, Any]) -> Pieces:
        nonlocal served
        served += 1
        return tokens(path, body) if served % 2 else json_answer({}, 500)

    argv = ["bench", "serve", "--num-prompts=4", "--input-len=2", "--output-len=2"]
    with fake_server(every_other) as server:
        assert cli.main([*argv, "--max-concurrency=1", f"--base-url={server.url}"]) == 1
    out = capsys.readouterr().out
    assert "2: HTTP 500" in out and "completed        2" in out
    served = 0
    with (
        fake_server(lambda p, b: tokens(p, b) if b["max_tokens"] == 1 else []) as server,
        pytest.raises(RequestFailedError, match="All 3"),
    ):
        run_serve(ServeBenchOptions(base_url=server.url, num_prompts=3, input_len=2))


def test_summary() -> None:
    def made(start: float, *chunks: float, **more: Any) -> RequestRecord:
        return RequestRecord(start, list(chunks), chunks[-1] if chunks else 0.0, **more)

    records = [
        made(0.0, 1.0, 1.5, 3.0, prompt_tokens=10, output_tokens=3),
        made(1.0, 1.5, 2.5, prompt_tokens=10, output_tokens=6),
        made(0.0, failure="timeout"),
    ]
    figures = summarize(records, 4.0, Goodput.parse(["ttft:1000", "itl:1000"]))
    assert figures["output_tokens_per_second"] == 9 / 4
    assert figures["total_tokens_per_second"] == 29 / 4
    assert figures["ttft_ms"] == pytest.approx(
        {"mean": 750.0, "p50": 750.0, "p90": 950.0, "p99": 995.0}
    )
    assert figures["itl_ms"]["mean"] == pytest.approx(1000.0)
    assert figures["tpot_ms"]["mean"] == pytest.approx((1000.0 + 200.0) / 2)
    assert figures["e2e_ms"]["mean"] == pytest.approx(2250.0)
    assert figures["goodput"]["met"] == 1
    assert figures["failures"] == {"timeout": 1}
    assert summarize(records[2:], 1.0, None)["ttft_ms"] is None
    assert summarize([made(0.0, 1.0)], 1.0, None)["tokens_counted_by"] == "chunks"


def test_arrivals_are_a_poisson_process() -> None:
    delays = arrival_delays(4000, 8.0, seed=3)
    gaps = [later - earlier for earlier, later in pairwise(delays)]
    assert delays[0] == 0 and min(gaps) > 0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.1)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.1)
    assert delays == arrival_delays(4000, 8.0, seed=3) != arrival_delays(4000, 8.0, seed=4)
    assert arrival_delays(3, math.inf, seed=0) == [0.0] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request_rate": 0.0}, "--request-rate"),
        ({"request_rate": math.nan}, "--request-rate"),
        ({"max_concurrency": 0}, "--max-concurrency"),
        ({"timeout_s": -1.0}, "--timeout"),
        ({"vocab_size": 0}, "--vocab-size"),
        ({"seed": -1}, "--seed"),
        ({"goodput": ("ttfb:1",)}, "--goodput ttfb:1"),
        ({"goodput": ("ttft",)}, "--goodput ttft"),
        ({"goodput": ("ttft:nan",)}, "--goodput ttft:nan"),
        ({"base_url": "localhost:8000"}, "--base-url"),
        ({"base_url": "http://h:x"}, "--base-url"),
        ({"base_url": "http://u:p@h"}, "--base-url"),
        ({"json_path": Path("/none/x.json")}, "does not exist"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_serve(ServeBenchOptions(**options))


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("http://h:1/v1", BaseURL("h", 1, False, "")),
        ("https://h/api/v1/", BaseURL("h", 443, True, "/api")),
        ("http://[::1]", BaseURL("::1", 80, False, "")),
    ],
)
def test_base_urls(url: str, parsed: BaseURL) -> None:
    assert BaseURL.parse(url) == parsed
    assert BaseURL.parse(str(parsed)) == parsed
