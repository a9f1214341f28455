"""Request ids and models: what holds for every route."""

import re

import pytest
from starlette.testclient import TestClient

from tests.server.fake_client import FakeClient

CHAT = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}


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
