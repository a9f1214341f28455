"""/tokenize and /detokenize; /version, /load and /ping."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

import jaxllm
from tests.server.conftest import MAX_MODEL_LEN
from tests.server.fake_client import FakeClient

TEXT = "Hi, wörld!"
MESSAGES = [{"role": "user", "content": "Hi"}]


def ask(http: TestClient, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_text(http: TestClient, engine: FakeClient) -> None:
    answer = ask(http, "/tokenize", prompt=TEXT)
    tokens = engine.tokenizer.encode(TEXT)
    assert answer == {
        "count": len(tokens),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": tokens,
        "token_strs": None,
    }
    assert ask(http, "/detokenize", tokens=tokens, model="fake") == {"prompt": TEXT}


def test_conversations_are_counted_as_they_are_sent(http: TestClient) -> None:
    chat = http.post("/v1/chat/completions", json={"model": "fake", "messages": MESSAGES})
    answer = ask(http, "/tokenize", model="fake", messages=MESSAGES)
    assert answer["count"] == chat.json()["usage"]["prompt_tokens"]
    shorter = ask(http, "/tokenize", messages=MESSAGES, add_generation_prompt=False)
    assert shorter["count"] < answer["count"]


def test_special_tokens_are_shown(http: TestClient) -> None:
    tokens = ask(http, "/tokenize", messages=MESSAGES, return_token_strs=True)
    assert tokens["token_strs"][0] == "<|im_start|>"
    text = ask(http, "/detokenize", tokens=tokens["tokens"])["prompt"]
    assert text.startswith("<|im_start|>user\nHi<|im_end|>")


def test_long_texts_leave_the_event_loop(http: TestClient, engine: FakeClient) -> None:
    text = "ab" * 100_000
    tokens = ask(http, "/tokenize", prompt=text)["tokens"]
    assert len(tokens) == len(text)  # bytes; the model's length does not limit counting
    assert ask(http, "/detokenize", tokens=tokens)["prompt"] == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": [2**63]}, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ],
)
def test_refusals(http: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_other_models_are_not_found(http: TestClient) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        response = http.post(path, json=body | {"model": "other"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_a_key_is_needed(serve: Callable[..., TestClient]) -> None:
    http = serve(api_keys=("secret",))
    assert http.post("/tokenize", json={"prompt": "a"}).status_code == 401
    assert http.post("/detokenize", json={"tokens": [1]}).status_code == 401
    assert http.get("/version").status_code == 401
    assert http.get("/load").status_code == 401
    assert http.get("/ping").status_code == 200


def test_version_load_and_ping(http: TestClient, engine: FakeClient) -> None:
    assert http.get("/version").json() == {"version": jaxllm.__version__}
    assert http.get("/load").json() == {"server_load": 0}
    assert http.get("/ping").status_code == 200
    engine.unready_because = "It sleeps."
    assert http.get("/ping").status_code == 503
