"""How many of everything a request may hold, and how deep: refused before any work."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.config.limits import MAX_N
from jaxllm.errors import InvalidRequestError
from jaxllm.sampling_params import MAX_LOGIT_BIAS
from server.openai.fields import (
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOPS,
    MAX_STRING_CHARS,
    MAX_TOOLS,
)
from server.openai.json_text import MAX_DEPTH, parse_json
from tests.server.fake_client import FakeClient

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGE = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}

Serve = Callable[..., TestClient]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [MESSAGE], "max_tokens": 2} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "Hi", "max_tokens": 2} | fields


def bias(count: int) -> dict[str, int]:
    return {str(token_id): 1 for token_id in range(count)}


TOO_MANY: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, chat(n=17), "n", "integer_above_max_value"),
    (COMPLETIONS, completion(n=17), "n", "integer_above_max_value"),
    (COMPLETIONS, completion(n=MAX_N + 1), "n", "integer_above_max_value"),
    (COMPLETIONS, completion(n=10**9), "n", "integer_above_max_value"),
    (COMPLETIONS, completion(n=0), "n", "integer_below_min_value"),
    (COMPLETIONS, completion(n=-1), "n", "integer_below_min_value"),
    (COMPLETIONS, completion(n="2"), "n", "invalid_type"),
    (COMPLETIONS, completion(n=True), "n", "invalid_type"),
    (COMPLETIONS, completion(best_of=10**9), "best_of", "integer_above_max_value"),
    (COMPLETIONS, completion(best_of=17), "best_of", "integer_above_max_value"),
    (COMPLETIONS, completion(n=3, best_of=2), "best_of", "invalid_value"),
    (COMPLETIONS, completion(best_of=2, stream=True), "best_of", "invalid_value"),
    (COMPLETIONS, completion(prompt=["x"] * (MAX_PROMPTS + 1)), "prompt", "array_above_max_length"),
    (COMPLETIONS, completion(prompt=[[1]] * (MAX_PROMPTS + 1)), "prompt", "array_above_max_length"),
    (COMPLETIONS, completion(prompt=[""] * 10**6), "prompt", "array_above_max_length"),
    (CHAT, chat(messages=[MESSAGE] * (MAX_MESSAGES + 1)), "messages", "array_above_max_length"),
    (CHAT, chat(tools=[TOOL] * (MAX_TOOLS + 1)), "tools", "array_above_max_length"),
    (CHAT, chat(stop=["x"] * (MAX_STOPS + 1)), "stop", "array_above_max_length"),
    (CHAT, chat(stop="x" * (MAX_STRING_CHARS + 1)), "stop", "string_above_max_length"),
    (CHAT, chat(stop=["x" * (MAX_STRING_CHARS + 1)]), "stop[0]", "string_above_max_length"),
    (CHAT, chat(bad_words=["x" * 300]), "bad_words[0]", "string_above_max_length"),
    (CHAT, chat(bad_words=["x"] * 257), "bad_words", "array_above_max_length"),
    (CHAT, chat(logit_bias=bias(MAX_LOGIT_BIAS + 1)), "logit_bias", "array_above_max_length"),
    (CHAT, chat(stop_token_ids=[1] * 65), "stop_token_ids", "array_above_max_length"),
    (CHAT, chat(allowed_token_ids=[1] * 300), "allowed_token_ids", "invalid_value"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "integer_above_max_value"),
    (COMPLETIONS, completion(logprobs=50257), "logprobs", "integer_above_max_value"),
    (COMPLETIONS, completion(prompt_logprobs=21), "prompt_logprobs", "integer_above_max_value"),
]


@pytest.mark.parametrize("row", TOO_MANY, ids=lambda row: json.dumps(row[1])[40:90])
def test_too_many(
    http: TestClient, engine: FakeClient, row: tuple[str, dict[str, Any], str, str]
) -> None:
    path, body, param, code = row
    response = http.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert len(error["message"]) < 300
    assert engine.num_running == 0


def test_just_enough(http: TestClient) -> None:
    for path, body in (
        (CHAT, chat(n=16, stop=["\0" * MAX_STRING_CHARS] * MAX_STOPS, tools=[TOOL] * MAX_TOOLS)),
        (COMPLETIONS, completion(prompt=["x"] * MAX_PROMPTS, logprobs=20)),
        (CHAT, chat(logit_bias=bias(258), allowed_token_ids=list(range(258)))),
    ):
        response = http.post(path, json=body)
        assert response.status_code == 200, response.text


def test_the_operator_may_allow_more_choices(serve: Serve) -> None:
    http = serve(max_n=MAX_N)
    assert len(http.post(CHAT, json=chat(n=MAX_N)).json()["choices"]) == MAX_N
    refused = serve(max_n=2).post(CHAT, json=chat(n=3))
    assert "--max-n" in refused.json()["error"]["message"]


def test_scored_prompts_are_not_multiplied_without_end(
    http: TestClient, engine: FakeClient
) -> None:
    """A small request must not ask for gigabytes: echo, logprobs and n times 64 prompts."""
    prompts = [[1] * 200] * MAX_PROMPTS
    body = completion(prompt=prompts, n=16, echo=True, logprobs=20, max_tokens=1)
    response = http.post(COMPLETIONS, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"
    assert not engine.prompts


def nested(depth: int, inner: str = "1") -> bytes:
    """Objects and arrays in turn."""
    opening = "".join('{"a":' if level % 2 else "[" for level in range(depth))
    closing = "".join("}" if level % 2 else "]" for level in reversed(range(depth)))
    return f"{opening}{inner}{closing}".encode()


def test_depth() -> None:
    assert parse_json(nested(MAX_DEPTH))
    wide = b"[" + b",".join([nested(MAX_DEPTH - 1)] * 1000) + b"]"
    assert parse_json(wide)
    assert parse_json(b'"' + b"[" * 1000 + b'"') == "[" * 1000
    for depth in (MAX_DEPTH + 1, 100, 150, 100_000):
        with pytest.raises(InvalidRequestError) as refused:
            parse_json(nested(depth))
        assert refused.value.code == "invalid_json"


@pytest.mark.parametrize("field", ["metadata", "tools", "chat_template_kwargs", "unknown"])
def test_depth_of_fields_nobody_looks_into(http: TestClient, field: str) -> None:
    body = json.dumps(chat()).encode()[:-1] + f', "{field}": '.encode() + nested(64) + b"}"
    response = http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    "body", [b"[" + b"1," * 2_000_000 + b"1]", b"[[" + b"[]," * 1_300_000 + b"[]]]"]
)
def test_checking_the_depth_of_a_large_body_is_quick(body: bytes) -> None:
    started = time.perf_counter()
    parse_json(body)
    assert time.perf_counter() - started < 10.0


def test_names_of_models_are_not_repeated_at_length(http: TestClient) -> None:
    name = "x" * 100_000
    assert len(http.post(CHAT, json=chat(model=name)).text) < 500
    assert len(http.get(f"/v1/models/{name[:3000]}").text) < 500
    assert len(http.get(f"/{name[:3000]}").text) < 500
