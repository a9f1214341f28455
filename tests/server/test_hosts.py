"""Web pages: under which names they may reach the server, and which of them may read answers."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from server.listen import guarded
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
PAGE = "https://page.example"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}

Serve = Callable[..., TestClient]


@pytest.fixture
def loopback() -> tuple[str, ...]:
    return guarded(ServerSettings()).allowed_hosts


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.", "a.localhost", "host.docker.internal:8000",
     "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "10.1.2.3", "192.168.0.7:8000", ""],
)  # fmt: skip
def test_names_of_this_machine(serve: Serve, loopback: tuple[str, ...], host: str) -> None:
    http = serve(allowed_hosts=loopback)
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["attacker.example", "attacker.example:8000", "localhost.attacker.example", "xlocalhost",
     "127.0.0.1.nip.io", "internal", "0x7f.1", "2130706433", "[::1", "localhost@evil", "a" * 4000],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/health", "/v1/models", CHAT, "/nothing"])
def test_names_of_others(
    serve: Serve, engine: FakeClient, loopback: tuple[str, ...], path: str, host: str
) -> None:
    response = serve(allowed_hosts=loopback).post(path, json=BODY, headers={"host": host})
    if host == "[::1":  # an address after all, if a crooked one
        return
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"
    assert len(response.text) < 400
    assert not engine.prompts


def test_own_names(serve: Serve) -> None:
    http = serve(allowed_hosts=("Llm.example.org", "*.corp.example"))
    for host, status in {
        "llm.example.org": 200,
        "a.b.corp.example:443": 200,
        "corp.example": 403,
        "localhost": 403,
        "10.0.0.1": 200,
    }.items():
        assert http.get("/v1/models", headers={"host": host}).status_code == status
    for any_name in ((), ("x", "*")):
        response = serve(allowed_hosts=any_name).get("/v1/models", headers={"host": "y"})
        assert response.status_code == 200


def test_without_cors_no_page_may_read(serve: Serve, engine: FakeClient) -> None:
    http = serve()
    preflight = http.options(CHAT, headers=PREFLIGHT)
    assert preflight.status_code == 405
    assert preflight.headers["allow"] == "POST"
    assert preflight.json()["error"]["code"] == "method_not_allowed"
    answers = [preflight, http.get("/v1/models", headers={"origin": PAGE})]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]
    # What a page may send without asking first is refused for its type.
    simple = http.post(CHAT, content=b"{}", headers={"origin": PAGE, "content-type": "text/plain"})
    assert simple.status_code == 415
    assert not engine.prompts


def test_a_listed_page_may(serve: Serve, engine: FakeClient) -> None:
    http = serve(cors_origins=(PAGE,), api_keys=("key",))
    preflight = http.options(CHAT, headers=PREFLIGHT)
    assert preflight.status_code == 200  # browsers send no key with it
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in preflight.headers
    headers = {"origin": PAGE, "authorization": "Bearer key"}
    served = http.post(CHAT, json=BODY, headers=headers)
    engine.fail_with = ZeroDivisionError("on purpose")
    for answer, status in (
        (served, 200),
        (http.post(CHAT, json=BODY, headers={"origin": PAGE}), 401),
        (http.post(CHAT, json=BODY, headers=headers), 500),
    ):
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "origin",
    ["https://other.example", "null", "http://page.example", f"{PAGE}.evil", f"{PAGE}:444", "*"],
)
def test_other_pages_may_not(serve: Serve, origin: str) -> None:
    http = serve(cors_origins=(PAGE,))
    preflight = http.options(CHAT, headers=PREFLIGHT | {"origin": origin})
    assert preflight.status_code == 403
    assert preflight.json()["error"]["code"] == "origin_not_allowed"
    answer = http.get("/v1/models", headers={"origin": origin})
    for response in (preflight, answer):
        assert "access-control-allow-origin" not in response.headers


def test_options_that_ask_nothing_stay_405(serve: Serve) -> None:
    assert serve(cors_origins=(PAGE,)).options(CHAT).status_code == 405
    assert serve(cors_origins=(PAGE,), api_keys=("k",)).options(CHAT).status_code == 401
