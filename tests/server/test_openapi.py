"""GET /openapi.json: it names every route, and real answers are as it says."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from server.openai.answers import ErrorAnswer
from server.routes import OPERATIONS

MESSAGES = [{"role": "user", "content": "Hi"}]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_the_document_is_whole(http: TestClient) -> None:
    document = http.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    schemas = document["components"]["schemas"]
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas, reference
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"200", "default"} <= operation["responses"].keys(), path
    assert document["paths"]["/health"]["get"]["security"] == []
    assert "security" not in document["paths"]["/metrics"]["get"]


def test_fields_have_their_bounds(http: TestClient) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    chat = schemas["ChatCompletionRequest"]
    assert set(chat["required"]) == {"model", "messages"}
    assert chat["properties"]["model"]["enum"] == ["fake", "alias"]
    temperature = chat["properties"]["temperature"]["anyOf"][0]
    assert (temperature["minimum"], temperature["maximum"]) == (0, 100)
    assert "use tools" in chat["properties"]["functions"]["description"]


ASKED: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/chat/completions", {"messages": MESSAGES}),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "n": 2, "prompt_logprobs": 1},
    ),
    ("POST", "/v1/completions", {"prompt": ["a", "b"]}),
    (
        "POST",
        "/v1/completions",
        {"prompt": "ä", "logprobs": 1, "echo": True, "max_tokens": 0, "prompt_logprobs": 0},
    ),
    ("POST", "/v1/completions", {"prompt": "a", "stop": "wör"}),
    ("POST", "/v1/responses", {"input": "Hi", "include": ["message.output_text.logprobs"]}),
    ("POST", "/v1/responses", {"input": "Hi", "max_output_tokens": 1, "reasoning": {}}),
    ("POST", "/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
    ("POST", "/v1/messages/count_tokens", {"messages": MESSAGES}),
    ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True}),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/detokenize", {"tokens": [1]}),
    ("GET", "/v1/models", {}),
    ("GET", "/v1/models/{model}", {}),
    ("GET", "/version", {}),
    ("GET", "/load", {}),
    ("GET", "/health", {}),
    ("GET", "/health/live", {}),
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: json.dumps(asked[1:])[:60])
def test_answers_are_as_they_are_described(
    http: TestClient, asked: tuple[str, str, dict[str, Any]]
) -> None:
    method, path, fields = asked
    body = {"model": "fake"} | fields if method == "POST" else None
    response = http.request(method, path.format(model="fake"), json=body)
    assert response.status_code == 200, response.text
    (schema,) = (
        each.answer
        for each in OPERATIONS
        if (each.method, each.path.replace(":path", "")) == (method, path)
    )
    assert schema is not None and issubclass(schema, BaseModel)
    schema.model_validate_json(response.content)


def test_errors_are_as_they_are_described(http: TestClient) -> None:
    for path in ("/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        response = http.post(path, json={"model": "fake"})
        assert response.status_code == 400
        ErrorAnswer.model_validate_json(response.content)


def test_it_needs_a_key_where_there_is_one(serve: Callable[..., TestClient]) -> None:
    http = serve(api_keys=("secret",))
    assert http.get("/openapi.json").status_code == 401
    key = {"Authorization": "Bearer secret"}
    assert http.get("/openapi.json", headers=key).json()["security"] == [{"key": []}]
    assert serve().get("/openapi.json").json()["security"] == []
