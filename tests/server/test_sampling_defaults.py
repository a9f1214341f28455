"""What the model recommends, where a request leaves it open."""

from typing import Any

import pytest
from msgspec import structs
from starlette.testclient import TestClient

from jaxllm.sampling_params import SamplingParams
from tests.server.fake_client import FakeClient

MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 32},
}
RECOMMENDED: dict[str, Any] = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
}
ASKED: dict[str, Any] = {
    "temperature": 0,
    "top_k": -1,
    "top_p": 1,
    "min_p": 0,
    "repetition_penalty": 1,
}


@pytest.fixture
def recommending(engine: FakeClient) -> FakeClient:
    engine.info = structs.replace(engine.info, sampling_defaults=RECOMMENDED)
    return engine


def sampled(http: TestClient, engine: FakeClient, path: str, **fields: Any) -> dict[str, Any]:
    """How the engine was told to sample."""
    response = http.post(path, json={"model": "fake"} | BODIES[path] | fields)
    assert response.status_code == 200, response.text
    params = engine.params[-1]
    if path == "/v1/responses":
        told = response.json()
        assert (told["temperature"], told["top_p"]) == (params.temperature, params.top_p)
    return {name: getattr(params, name) for name in RECOMMENDED}


@pytest.mark.parametrize("path", BODIES)
def test_the_model_s_where_a_request_leaves_it_open(
    http: TestClient, recommending: FakeClient, path: str
) -> None:
    assert sampled(http, recommending, path) == RECOMMENDED
    assert sampled(http, recommending, path, **dict.fromkeys(RECOMMENDED)) == RECOMMENDED
    one = sampled(http, recommending, path, top_p=0.5)
    assert one == RECOMMENDED | {"top_p": 0.5}
    assert sampled(http, recommending, path, **ASKED) == ASKED | {"top_k": 0}
    assert recommending.params[-1].greedy


@pytest.mark.parametrize("path", BODIES)
def test_ours_where_the_model_recommends_nothing(
    http: TestClient, engine: FakeClient, path: str
) -> None:
    defaults = SamplingParams()
    assert sampled(http, engine, path) == {name: getattr(defaults, name) for name in RECOMMENDED}
