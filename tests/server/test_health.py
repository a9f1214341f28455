"""What probes are told, and that they need no key."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from server.serving import Serving
from tests.server.fake_client import FakeClient

READY = ("/health", "/health/ready")


@pytest.fixture
def http(serve: Callable[..., TestClient]) -> TestClient:
    return serve(api_keys=("secret",))


def test_all_is_well(http: TestClient) -> None:
    for path in READY:
        assert (http.get(path).status_code, http.get(path).json()) == (200, {"status": "ready"})
        assert http.head(path).status_code == 200
        assert http.post(path, headers={"authorization": "Bearer secret"}).status_code == 405
    assert http.get("/health/live").json() == {"status": "live"}


def test_the_engine_is_down_or_late(http: TestClient, engine: FakeClient) -> None:
    engine.unready_because = "The engine has shown no progress for 20 s."
    for path in READY:
        response = http.get(path)
        assert response.status_code == 503
        error = response.json()["error"]
        assert (error["code"], error["message"]) == ("engine_unavailable", engine.unready_because)
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert int(response.headers["retry-after-ms"]) >= 1000
    assert http.get("/health/live").status_code == 200


def test_the_server_is_going(http: TestClient) -> None:
    serving: Serving = http.app.state.serving  # type: ignore[attr-defined]
    serving.drain.begin()
    for path in READY:
        response = http.get(path)
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "The server is shutting down."
    assert http.get("/health/live").status_code == 200


def test_a_drain_refuses_work_but_not_without_a_key(http: TestClient) -> None:
    serving: Serving = http.app.state.serving  # type: ignore[attr-defined]
    serving.drain.begin()
    body = {"model": "fake", "prompt": "a"}
    assert http.post("/v1/completions", json=body).status_code == 401
    headers = {"authorization": "Bearer secret"}
    refused = http.post("/v1/completions", json=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert http.get("/v1/models", headers=headers).status_code == 200


def test_requests_are_counted_to_their_last_byte(http: TestClient, engine: FakeClient) -> None:
    serving: Serving = http.app.state.serving  # type: ignore[attr-defined]
    headers = {"authorization": "Bearer secret"}
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}, {"prompt": 3}):
        http.post("/v1/completions", json={"model": "fake"} | body, headers=headers)
        assert serving.drain.num_requests == 0
    engine.fail_with = RuntimeError("a bug")
    answer = http.post("/v1/completions", json={"model": "fake", "prompt": "a"}, headers=headers)
    assert answer.status_code == 500 and serving.drain.num_requests == 0
