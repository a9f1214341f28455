import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.errors import EngineDeadError
from server.access_log import start_logging
from server.middleware.auth import tenant_of
from tests.server.fake_client import FakeClient

KEY = "sk-secret-key"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "top secret"}]}
NASTY = 'x\r\n{"status":200}\x1b[2J\x9b31m\x7f\u2028\x85\x00'


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was logged since the last call."""

    def take() -> list[str]:
        taken = [r.getMessage() for r in caplog.records if r.name == "jaxllm.access"]
        caplog.clear()
        return taken

    with caplog.at_level(logging.INFO, logger="jaxllm.access"):
        yield take


def test_one_line_with_all_there_is(
    serve: Callable[..., TestClient], lines: Callable[[], list[str]]
) -> None:
    http = serve(api_keys=(KEY,))
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "mine"}
    answer = http.post(CHAT, json=BODY | {"max_tokens": 3}, headers=headers).json()
    (line,) = lines()
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", found.pop("time"))
    assert 0 < found.pop("total_s") < 10
    assert found == {
        "request_id": "mine",
        "method": "POST",
        "route": CHAT,
        "status": 200,
        "tenant": tenant_of(KEY),
        "model": "fake",
        "prompt_tokens": answer["usage"]["prompt_tokens"],
        "cached_tokens": 0,
        "output_tokens": 3,
        "queue_s": 0.125,
        "prefill_s": 0.125,
        "decode_s": 0.5,
        "first_token_s": 0.25,
        "finish_reasons": ["length"],
    }


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_every_prompt_and_choice(
    http: TestClient, lines: Callable[[], list[str]], stream: bool
) -> None:
    body = {"model": "fake", "prompt": ["ab", "abc"], "n": 2, "max_tokens": 3, "stream": stream}
    assert http.post("/v1/completions", json=body).status_code == 200
    found = json.loads(lines()[0])
    assert (found["prompt_tokens"], found["output_tokens"]) == (5, 12)
    assert found["finish_reasons"] == ["length"] * 4


def test_nothing_that_was_said_is_logged(
    serve: Callable[..., TestClient], lines: Callable[[], list[str]]
) -> None:
    http = serve(api_keys=(KEY,), access_log="text")
    http.post(CHAT, json=BODY | {"user": "alice"}, headers={"authorization": f"Bearer {KEY}"})
    http.post(CHAT, json=BODY, headers={"authorization": "Bearer wrong-key"})
    http.get("/secret/path?query=hidden", headers={"authorization": f"Bearer {KEY}"})
    text = "\n".join(lines())
    assert len(text.splitlines()) == 3
    for said in ("secret", "Hello", "alice", "wrong", "hidden", KEY):
        assert said not in text


@pytest.mark.parametrize("style", ["json", "text"])
def test_no_line_can_be_forged(
    serve: Callable[..., TestClient], lines: Callable[[], list[str]], style: str
) -> None:
    http = serve(access_log=style)
    http.post(CHAT, json=BODY | {"model": NASTY, "user": NASTY})
    http.post(CHAT, json=BODY | {"user": NASTY}, headers={"x-request-id": "a\x1b[31mb"})
    http.post(CHAT, json=BODY | {"model": "m" * 100_000})
    logged = lines()
    assert len(logged) == 3
    assert all(re.fullmatch(r"[\x20-\x7e]{1,1000}", line) for line in logged)
    if style == "json":
        found = [json.loads(line) for line in logged]
        assert (found[0]["model"], found[0]["status"]) == (NASTY, 404)
        assert re.fullmatch(r"req_[0-9a-f]{32}", found[1]["request_id"])
    else:
        assert logged[0].startswith('time="') and ' model="x\\r\\n{' in logged[0]


def test_failures_say_why(
    http: TestClient, lines: Callable[[], list[str]], engine: FakeClient
) -> None:
    engine.fail_with, engine.fail_at = EngineDeadError("gone"), 2
    http.post(CHAT, json=BODY)
    http.post(CHAT, json=BODY | {"stream": True})
    whole, streamed = (json.loads(line) for line in lines())
    assert (whole["status"], whole["error"]) == (503, "engine_unavailable")
    assert (streamed["status"], streamed["error"]) == (200, "engine_unavailable")
    assert (streamed["output_tokens"], streamed["finish_reasons"]) == (2, [])


def test_deadlines_are_seen(
    http: TestClient, lines: Callable[[], list[str]], engine: FakeClient
) -> None:
    engine.step_seconds = 5
    http.post(CHAT, json=BODY, headers={"x-request-timeout-ms": "20"})
    found = json.loads(lines()[0])
    assert (found["status"], found["error"]) == (504, "aborted")


def test_off(serve: Callable[..., TestClient], lines: Callable[[], list[str]]) -> None:
    serve(access_log="off").get("/health")
    assert lines() == []


def test_lines_stand_alone_on_standard_error(
    serve: Callable[..., TestClient], capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("jaxllm.access")
    before = logger.handlers[:], logger.propagate, logger.level
    try:
        start_logging("json")
        serve().get("/health/live")
        out, err = capsys.readouterr()
        assert out == ""
        assert json.loads(err)["route"] == "/health/live"
    finally:
        logger.handlers[:], logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
