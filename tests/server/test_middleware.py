"""Keys, request ids, body sizes, health, models: what holds for every route."""

import re
from collections.abc import Callable, Iterator

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from server.app import ROUTES
from tests.server.fake_client import FakeClient

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
KEY = "s3cret-key"

Serve = Callable[..., TestClient]


def test_every_route_needs_the_key_but_health(serve: Serve) -> None:
    http = serve(api_keys=(KEY, "other"))
    paths = [route.path for route in ROUTES if isinstance(route, Route)]
    assert "/health" in paths
    tricks = ["/", "/nothing", "//health", "/health/", "/health/x", "/v1/health", "/HEALTH"]
    for path in [*paths, *tricks]:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT"):
            response = http.request(method, path.replace("{model:path}", "fake"))
            assert response.status_code == 401 or path == "/health"
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "value", [None, "", KEY, "Bearer", "Bearer ", f"Basic {KEY}", "Bearer wrong", f"Bearer {KEY}x"]
)
def test_wrong_keys(serve: Serve, engine: FakeClient, value: str | None) -> None:
    headers = {} if value is None else {"authorization": value}
    response = serve(api_keys=(KEY,)).post(CHAT, json=BODY, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    wrong = value is not None and re.fullmatch(r"Bearer \S+", value)
    assert response.json()["error"]["code"] == ("invalid_api_key" if wrong else None)
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert KEY not in response.text
    assert not engine.prompts


@pytest.mark.parametrize("key", [KEY, "clé-ü"])
def test_any_of_the_keys_opens(serve: Serve, key: str) -> None:
    http = serve(api_keys=("one", key))
    headers = {b"authorization": f"bearer {key}".encode()}
    assert http.post(CHAT, json=BODY, headers=headers).status_code == 200


def test_host_header_opens_nothing(serve: Serve) -> None:
    response = serve(api_keys=(KEY,)).get("/v1/models", headers={"host": "x/health?"})
    assert response.status_code == 401


@pytest.mark.parametrize("given", ["abc-1._Z", "x" * 128])
def test_request_id_is_echoed(http: TestClient, engine: FakeClient, given: str) -> None:
    response = http.post(CHAT, json=BODY, headers={"x-request-id": given})
    assert response.headers["x-request-id"] == given
    assert given not in engine.request_ids[0]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\u00e9", "<script>"])
def test_other_request_ids_are_replaced(http: TestClient, given: str) -> None:
    headers = {"x-request-id": given.encode()}
    response = http.get("/v1/models", headers=headers)  # pyright: ignore[reportArgumentType]
    assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])


def test_claimed_size(serve: Serve) -> None:
    http = serve(max_body_bytes=1000)
    response = http.post(CHAT, content=b"x" * 1001)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.headers["connection"] == "close"


def test_real_size(serve: Serve, engine: FakeClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    headers = {"content-type": "application/json"}
    response = serve(max_body_bytes=1000).post(CHAT, content=chunks(), headers=headers)
    assert response.status_code == 413
    assert not engine.prompts


@pytest.mark.parametrize("claim", ["9" * 5000, "-1", "1e3"])
def test_odd_sizes(http: TestClient, claim: str) -> None:
    response = http.post(CHAT, content=b"{}", headers={"content-length": claim})
    assert response.status_code == 413


def test_health(http: TestClient, engine: FakeClient) -> None:
    assert http.get("/health").status_code == 200
    engine.ready = False
    response = http.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert int(response.headers["retry-after-ms"]) >= 1000


def test_models(http: TestClient) -> None:
    answer = http.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [card["id"] for card in answer["data"]] == ["fake", "alias"]
    card = http.get("/v1/models/alias").json()
    assert card == answer["data"][1]
    assert (card["object"], card["root"], card["max_model_len"]) == ("model", "org/fake", 256)
    response = http.get("/v1/models/org/none")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_any_served_name_works(http: TestClient) -> None:
    assert http.post(CHAT, json=BODY | {"model": "alias"}).json()["model"] == "alias"
