"""Keys: which paths need one, however a path is written; what a key tells later code."""

import asyncio
import contextlib
import logging
import random
import re
import statistics
import string
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from jaxllm.bench.http_client import BaseURL, request
from jaxllm.bench.serve import request_headers
from jaxllm.errors import AuthenticationError
from server.app import create_app
from server.middleware.auth import ANYBODY, OPEN_PATHS, AuthMiddleware, tenant_of
from server.routes import ROUTES
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient
from tests.server.wire import running, say

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
KEY = "s3cret-key"
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "TRACE", "QUERY")
PATHS = sorted({re.sub(r"{.*}", "fake", r.path) for r in ROUTES if isinstance(r, Route)})
OTHER_PATHS = (
    "/", "/nothing", "/docs", "/openapi.json", "/v1", "/v2/models", "/HEALTH", "/health/x",
    "/health%00", "/healthz", "/ping/", "/v1/ping", "/invocations",
)  # fmt: skip

Serve = Callable[..., TestClient]


def test_only_these_paths_are_open() -> None:
    assert {"/health", "/health/live", "/health/ready", "/ping"} == OPEN_PATHS
    assert len(PATHS) > 5


@pytest.mark.parametrize("path", [*PATHS, *OTHER_PATHS])
def test_every_path_and_method_needs_a_key(serve: Serve, engine: FakeClient, path: str) -> None:
    http = serve(api_keys=(KEY, "other"))
    hosts = ("x", "x/docs?", "x/health?", "health")
    for method, host in product(METHODS, hosts):
        response = http.request(
            method, path, headers={"host": host, "x-http-method-override": "GET"}
        )
        if path in OPEN_PATHS:
            assert response.status_code != 401
            continue
        assert response.status_code == 401, (method, host)
        assert response.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert response.json()["error"].get("code") is None
    assert not engine.prompts


def targets(path: str) -> Iterator[str]:
    """Ways to write a path so that one part of a server may take it for another."""
    yield from (path, f"/{path}", f"{path}/", f"{path}//", f"{path}?key={KEY}", f"{path}%00")
    yield from (f"/%2e{path}", f"/health/..{path}", f"/health%2f..{path}", f"{path}/../health")
    yield from (f"{path}%2f..%2fhealth", f"{path}%3f", f"{path};/health", f"{path}/%2e%2e/health")
    yield from (f"/%{ord(path[1]):02x}{path[2:]}", f"http://localhost{path}", f"HTTP://x:1{path}")
    yield from (f"http://localhost/health/..{path}", f"*{path}", f"http://x@y{path}", path[1:])


def test_however_a_path_is_written(engine: FakeClient) -> None:
    """Over raw connections: 401, unless the request was malformed before it came so far."""
    settings = ServerSettings(served_model_names=("fake",), api_keys=(KEY,))
    fields = (
        "X-HTTP-Method-Override: GET",
        "X-Original-URL: /health",
        "X-Forwarded-Prefix: /health",
    )
    lines = "".join(f"{field}\r\n" for field in fields)
    seen: list[int] = []
    with running(create_app(engine, settings)) as port:
        for path in set(PATHS) - OPEN_PATHS:
            for target, method in product(targets(path), ("GET", "POST", "OPTIONS", "HEAD")):
                head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n"
                answer = say(port, head.encode(), method=method)
                assert answer.status in (400, 401), target
                seen.append(answer.status)
    assert seen.count(401) > 0.7 * len(seen)
    assert not engine.prompts


def test_open_paths_are_open_however_written(engine: FakeClient) -> None:
    settings = ServerSettings(served_model_names=("fake",), api_keys=(KEY,))
    with running(create_app(engine, settings)) as port:
        for target in ("/health", "/%68ealth", "http://localhost/health", "/health?x=1"):
            head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert say(port, head.encode()).status == 200


def test_metrics_may_be_opened(serve: Serve) -> None:
    assert serve(api_keys=(KEY,)).get("/metrics").status_code == 401
    open_to_all = serve(api_keys=(KEY,), metrics_no_auth=True)
    assert open_to_all.get("/metrics").status_code == 200
    assert open_to_all.get("/v1/models").status_code == 401
    assert open_to_all.get("/metrics/").status_code == 401


@pytest.mark.parametrize(
    "value",
    [None, "", KEY, "Bearer", "Bearer ", f"Basic {KEY}", "Bearer wrong", f"Bearer {KEY}x",
     f"Bearer {KEY[:-1]}", f"Bearer {KEY} {KEY}", f"Bearer {KEY.upper()}", "Bearer 🔑"],
)  # fmt: skip
def test_wrong_keys(serve: Serve, engine: FakeClient, value: str | None) -> None:
    headers: Any = {} if value is None else {"authorization": value.encode()}
    response = serve(api_keys=(KEY,)).post(CHAT, json=BODY, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    wrong = value is not None and re.fullmatch(r"Bearer \S.*", value)
    assert response.json()["error"]["code"] == ("invalid_api_key" if wrong else None)
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert KEY not in response.text
    assert not engine.prompts


def test_two_authorizations_are_none(engine: FakeClient) -> None:
    settings = ServerSettings(served_model_names=("fake",), api_keys=(KEY,))
    field = f"Authorization: Bearer {KEY}\r\n"
    with running(create_app(engine, settings)) as port:
        head = "GET /v1/models HTTP/1.1\r\nHost: x\r\n"
        assert say(port, (head + field + "\r\n").encode()).status == 200
        assert say(port, (head + field + field + "\r\n").encode()).status == 401


@pytest.mark.parametrize("key", [KEY, "clé-ü", "voilà", "ключ"])  # à ends like a space of Latin-1
def test_any_of_the_keys_opens(serve: Serve, key: str) -> None:
    http = serve(api_keys=("one", key))
    headers: Any = {b"authorization": f"bearer {key}".encode()}
    assert http.post(CHAT, json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize("key", [KEY, "voilà", "ключ"])
def test_our_own_clients_send_any_key(
    engine: FakeClient, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("JAXLLM_API_KEY", key)
    settings = ServerSettings(served_model_names=("fake",), api_keys=(key,))

    async def status(port: int) -> int:
        base = BaseURL.parse(f"http://127.0.0.1:{port}")
        async with request(base, "GET", "/v1/models", headers=request_headers()) as response:
            return response.status

    with running(create_app(engine, settings)) as port:
        assert asyncio.run(status(port)) == 200


def test_a_key_is_known_as_a_tenant() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["state"]["tenant"])

    async def pass_through(*keys: str, given: str | None = None, path: str = "/x") -> None:
        headers = [] if given is None else [(b"authorization", f"Bearer {given}".encode())]
        scope = {"type": "http", "path": path, "headers": headers, "state": {"request_id": "r"}}
        await AuthMiddleware(app, keys, OPEN_PATHS)(scope, None, None)  # pyright: ignore

    for given in ("one", "two", "one"):
        run(pass_through("two", "one", given=given))
    run(pass_through())
    run(pass_through("one", path="/health"))
    assert seen == [tenant_of("one"), tenant_of("two"), tenant_of("one"), ANYBODY, ANYBODY]
    assert all(re.fullmatch(r"[0-9a-f]{12}", tenant) for tenant in seen[:3])


def test_the_engine_hears_of_the_tenant_and_never_of_the_key(
    serve: Serve, engine: FakeClient
) -> None:
    http = serve(api_keys=("one", KEY))
    for path, body in ((CHAT, BODY), ("/v1/completions", {"model": "fake", "prompt": "Hi"})):
        headers = {"authorization": f"Bearer {KEY}"}
        assert http.post(path, json=body, headers=headers).status_code == 200
    assert engine.tenants == [tenant_of(KEY)] * 2
    assert serve().post(CHAT, json=BODY).status_code == 200
    assert engine.tenants[2] == ANYBODY


def test_a_key_that_floods_keeps_no_other_out(serve: Serve) -> None:
    http = serve(api_keys=("one", KEY), fair=True, max_num_seqs=1, max_num_queued_reqs=3)
    gate = http.app.state.serving.gate  # pyright: ignore[reportAttributeAccessIssue]
    with gate.admit(4, 4, tenant_of("one")):
        for key, status in (("one", 429), (KEY, 200)):
            headers = {"authorization": f"Bearer {key}"}
            assert http.post(CHAT, json=BODY, headers=headers).status_code == status


def run(coroutine: Any) -> None:
    with pytest.raises(StopIteration):
        coroutine.send(None)


def test_neither_keys_nor_prompts_are_logged(
    serve: Serve, engine: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    http = serve(api_keys=(KEY,))
    secret = "the-prompt-nobody-may-see"
    body = {**BODY, "messages": [{"role": "user", "content": secret}], "user": secret}
    right, wrong = ({"authorization": f"Bearer {key}"} for key in (KEY, f"{KEY}-wrong"))
    assert http.post(CHAT, json=body, headers=wrong).status_code == 401
    assert http.post(CHAT, json=body, headers=right).status_code == 200
    assert http.post(CHAT, json=body | {"stream": True}, headers=right).status_code == 200
    assert http.post(CHAT, json=body | {"n": secret}, headers=right).status_code == 400
    engine.fail_with = ZeroDivisionError("on purpose")
    assert http.post(CHAT, json=body, headers=right).status_code == 500
    assert "on purpose" in caplog.text
    assert KEY not in caplog.text
    assert secret not in caplog.text


def test_every_key_is_compared_whichever_is_right(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        calls.append((one, other))
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    http = serve(api_keys=("a", "b", "c"))
    for key in ("a", "b", "c", "d"):
        calls.clear()
        http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        assert len(calls) == 3
        assert {len(side) for pair in calls for side in pair} == {32}  # digests, not keys


@pytest.mark.alone
def test_comparing_takes_as_long_for_a_near_miss() -> None:
    """Welch's t over 20,000 wrong keys, half of which share all but their last character."""
    rng = random.Random(0)

    def some(length: int) -> str:
        return "".join(rng.choices(string.ascii_letters, k=length))

    key = some(64)
    guard = AuthMiddleware(None, (key,), OPEN_PATHS)  # pyright: ignore[reportArgumentType]
    tries = [(near, f"Bearer {key[:-1]}+" if near else f"Bearer {some(63)}+")
             for near in (False, True) * 10_000]  # fmt: skip
    rng.shuffle(tries)

    def score() -> float:
        samples: tuple[list[float], list[float]] = ([], [])
        for near, value in tries:
            values = [value]
            started = time.perf_counter()
            with contextlib.suppress(AuthenticationError):
                guard._tenant(values)
            samples[near].append(time.perf_counter() - started)
        sides = [sorted(side)[:9_500] for side in samples]  # less the hiccups
        errors = sum(statistics.variance(side) / len(side) for side in sides)
        return abs(statistics.fmean(sides[0]) - statistics.fmean(sides[1])) / errors**0.5

    scores: list[float] = []
    for _ in range(5):
        scores.append(score())
        if scores[-1] < 4.5:
            return
    raise AssertionError(f"the time tells how much of a key was right: t = {scores}")
