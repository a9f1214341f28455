"""Over a real port: the openai client, clients that leave, pings."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from jaxllm.errors import EngineDeadError
from tests.server.fake_client import ANSWER, FakeClient

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        yield client


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def raw_request(live: str, body: dict[str, object]) -> socket.socket:
    """A connection on which one chat request was sent."""
    content = json.dumps({"model": "fake", "messages": MESSAGES} | body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", urlsplit(live).port or 0), timeout=20)
    connection.sendall(head.encode() + content)
    return connection


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES)
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage is not None and answer.usage.completion_tokens > 0


def test_openai_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        stream=True,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ANSWER
    assert chunks[-1].usage is not None


def test_openai_completions_and_models(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="fake", prompt=[[1, 2], [3]], n=2, echo=True, logprobs=1, max_tokens=3
    )
    assert len(answer.choices) == 4
    assert client.models.list().data[0].id == "fake"
    assert client.models.retrieve("fake").id == "fake"


def test_openai_errors(client: openai.OpenAI, engine: FakeClient) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake", messages=MESSAGES, temperature=-1)
    assert (bad.value.param, bad.value.code) == ("temperature", "decimal_below_min_value")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")
    engine.fail_with, engine.fail_at = EngineDeadError("It died."), 2
    stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError) as died:
        list(stream)
    assert died.value.code == "engine_unavailable"


def test_async_openai_clients_side_by_side(live: str) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none") as client:
            ask = client.chat.completions.create
            answers = await asyncio.gather(
                *(ask(model="fake", messages=MESSAGES) for _ in range(20))
            )
        return [answer.choices[0].message.content or "" for answer in answers]

    assert asyncio.run(run()) == [ANSWER] * 20


def test_keep_alive_works_after_an_error(live: str) -> None:
    with httpx.Client(base_url=live) as http:
        for _ in range(2):
            assert http.post("/v1/chat/completions", json={}).status_code == 400
            assert http.get("/nothing").status_code == 404
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_aborts_its_request(
    live: str, engine: FakeClient, streamed: bool
) -> None:
    engine.step_seconds = 0.02
    connection = raw_request(
        live, {"stream": streamed, "ignore_eos": True, "max_tokens": 200, "n": 2}
    )
    wait_until(lambda: engine.num_running)
    if streamed:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_until(lambda: engine.aborted, seconds=1.0)
    assert engine.num_running == 0


def test_a_client_that_leaves_before_the_first_token(live: str, engine: FakeClient) -> None:
    engine.step_seconds = 60.0
    connection = raw_request(live, {"stream": True})
    wait_until(lambda: engine.num_running)
    connection.close()
    wait_until(lambda: engine.aborted, seconds=1.0)


def test_pings_while_nothing_comes(live: str, engine: FakeClient) -> None:
    engine.step_seconds = 0.5
    with httpx.Client(base_url=live, timeout=10) as http:
        body = {"model": "fake", "messages": MESSAGES, "stream": True, "max_tokens": 1}
        response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.text.startswith(": ping\n\n: ping\n\ndata: {")
    assert response.text.endswith("data: [DONE]\n\n")
    assert response.headers["transfer-encoding"] == "chunked"


def test_error_after_a_ping_is_an_event(live: str, engine: FakeClient) -> None:
    engine.step_seconds, engine.fail_with = 0.3, EngineDeadError("It died.")
    body = {"model": "fake", "messages": MESSAGES, "stream": True}
    response = httpx.post(f"{live}/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert '"code":"engine_unavailable"' in response.text
    assert "[DONE]" not in response.text


def test_slow_readers_lose_nothing(live: str) -> None:
    connection = raw_request(live, {"stream": True, "max_tokens": 30, "ignore_eos": True})
    time.sleep(0.2)
    received = b""
    while b"[DONE]" not in received:
        received += connection.recv(64)
    connection.close()
    assert received.count(b'"finish_reason":"length"') == 1
