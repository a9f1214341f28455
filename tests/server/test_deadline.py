"""Requests that take too long: what their clients are told, and that the engine is rid of them."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient
from tests.server.sse import read_stream
from tests.server.test_live import wait_until
from tests.server.wire import running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"model": "fake", "prompt": "Hi", "max_tokens": 200, "ignore_eos": True}
pytestmark = pytest.mark.alone

SOON = {"x-request-timeout-ms": "150"}

Serve = Callable[..., TestClient]


def check_504(response: Any) -> None:
    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_in_time_is_504(serve: Serve, engine: FakeClient, stream: bool) -> None:
    engine.step_seconds = 30.0
    started = time.monotonic()
    check_504(serve().post(COMPLETIONS, json=BODY | {"stream": stream}, headers=SOON))
    assert time.monotonic() - started < 15.0
    assert engine.num_running == 0
    assert len(engine.aborted) == 1


def test_tokens_do_not_help_an_answer_that_is_sent_whole(serve: Serve, engine: FakeClient) -> None:
    engine.step_seconds = 0.01
    check_504(serve().post(COMPLETIONS, json=BODY | {"n": 3}, headers=SOON))
    assert len(engine.aborted) == 1


def test_after_a_token_it_is_an_event(serve: Serve, engine: FakeClient) -> None:
    engine.step_seconds = 0.01
    response = serve().post(COMPLETIONS, json=BODY | {"stream": True}, headers=SOON)
    assert response.status_code == 200
    stream = read_stream(response.text)
    assert stream.error is not None and stream.error["code"] == "deadline_exceeded"
    assert len(stream.objects) > 2
    assert len(engine.aborted) == 1


def test_after_a_ping_too(engine: FakeClient) -> None:
    """Over a real port: the headers have gone out by then."""
    engine.step_seconds = 30.0
    settings = ServerSettings(served_model_names=("fake",), ping_interval_s=0.05)
    with running(create_app(engine, settings)) as port:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url) as http:
            response = http.post(COMPLETIONS, json=BODY | {"stream": True}, headers=SOON)
            stream = read_stream(response.text)
            assert stream.error is not None and stream.error["code"] == "deadline_exceeded"
            assert stream.num_pings
            assert http.get("/v1/models").status_code == 200  # the connection goes on
        wait_until(lambda: engine.aborted)


def test_the_operators_limit(serve: Serve, engine: FakeClient) -> None:
    engine.step_seconds = 30.0
    http = serve(request_timeout=0.1)
    check_504(http.post(COMPLETIONS, json=BODY))
    check_504(http.post(COMPLETIONS, json=BODY, headers={"x-request-timeout-ms": "60000"}))
    chat = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
    check_504(http.post(CHAT, json=chat))


@pytest.mark.parametrize("value", ["60000", "1" + "0" * 9, "0060000"])
def test_in_time(serve: Serve, engine: FakeClient, value: str) -> None:
    response = serve().post(
        COMPLETIONS, json=BODY | {"max_tokens": 3}, headers={"x-request-timeout-ms": value}
    )
    assert response.status_code == 200
    assert not engine.aborted


@pytest.mark.parametrize(
    "value", ["", "0", "000", "-1", "+5", "1.5", "1e3", "soon", "NaN", " ", "9" * 30, "٣", "1,2"]
)
def test_no_number_of_milliseconds(serve: Serve, engine: FakeClient, value: str) -> None:
    headers: Any = {"x-request-timeout-ms": value.encode()}
    response = serve().post(COMPLETIONS, json=BODY, headers=headers)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("x-request-timeout-ms", "invalid_value")
    assert not engine.prompts


def test_rendering_a_chat_counts(
    serve: Serve, engine: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def render(*args: Any, **kwargs: Any) -> str:
        time.sleep(0.3)
        return "Hi"

    monkeypatch.setattr(engine.tokenizer, "apply_chat_template", render)
    messages = [{"role": "user", "content": "x" * 30_000}]  # long enough for a thread of its own
    body = {"model": "fake", "messages": messages}
    check_504(serve().post(CHAT, json=body, headers={"x-request-timeout-ms": "50"}))
    assert not engine.prompts
