"""Every field that says what an answer must look like, as the engine gets it, and refusals."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.grammar.structured_outputs import StructuredOutputsParams
from tests.server.fake_client import FakeClient
from tests.server.test_fields import CHAT, COMPLETIONS, RESPONSES, post

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}


def as_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | fields}


ANYWHERE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"guided_json": SCHEMA}, {"json": SCHEMA}),
    ({"guided_json": json.dumps(SCHEMA)}, {"json": SCHEMA}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
    ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    (
        {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
        {"json": SCHEMA, "whitespace_pattern": " ?"},
    ),
    ({"guided_regex": "a", "guided_decoding_backend": "xgrammar"}, {"regex": "a"}),
    ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
    ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
    ({"structured_outputs": {"structural_tag": TAG}}, {"structural_tag": TAG}),
    (
        {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
        {"json": {}, "disable_any_whitespace": True},
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}},
        {"json": SCHEMA, "disable_additional_properties": True},
    ),
]
COMPLETION_FORMATS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "json_object"}, {"json_object": True}),
    (as_format(SCHEMA), {"json": SCHEMA, "closes": True}),
    (as_format(SCHEMA, strict=True, description="d"), {"json": SCHEMA, "closes": True}),
    (as_format(SCHEMA, strict=False), {"json": SCHEMA, "closes": True}),
    ({"type": "structural_tag"} | TAG, {"structural_tag": TAG}),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize(("fields", "wanted"), ANYWHERE)
def test_fields_of_vllm(
    http: TestClient, engine: FakeClient, path: str, fields: Any, wanted: Any
) -> None:
    answer = post(http, path, **fields)
    assert answer.status_code == 200, answer.text
    assert engine.params[0].structured_outputs == StructuredOutputsParams(**wanted)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("value", "wanted"), COMPLETION_FORMATS)
def test_response_format(
    http: TestClient, engine: FakeClient, path: str, value: Any, wanted: Any
) -> None:
    answer = post(http, path, response_format=value)
    assert answer.status_code == 200, answer.text
    assert engine.params[0].structured_outputs == StructuredOutputsParams(**wanted)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"type": "json_object"}, {"json_object": True}),
        (
            {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True},
            {"json": SCHEMA, "closes": True},
        ),
    ],
)
def test_text_format_of_responses(
    http: TestClient, engine: FakeClient, value: Any, wanted: Any
) -> None:
    answer = post(http, RESPONSES, text={"format": value})
    assert answer.status_code == 200, answer.text
    assert engine.params[0].structured_outputs == StructuredOutputsParams(**wanted)
    assert answer.json()["text"] == {"format": value}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_plain_text_asks_for_nothing(http: TestClient, engine: FakeClient, path: str) -> None:
    plain = {"text": {"format": {"type": "text"}}, "response_format": {"type": "text"}}
    name = "text" if path == RESPONSES else "response_format"
    assert post(http, path, **{name: plain[name]}).status_code == 200
    assert engine.params[0].structured_outputs is None


@pytest.mark.parametrize(
    ("fields", "param", "code", "reason"),
    [
        ({"response_format": as_format({"not": {}})}, "response_format", "invalid_grammar", "not"),
        ({"guided_json": {"if": {}}}, "guided_json", "invalid_grammar", "if"),
        ({"guided_regex": "("}, "guided_regex", "invalid_grammar", "unclosed"),
        ({"guided_choice": []}, "guided_choice", "empty_array", "at least 1"),
        ({"guided_json": 1}, "guided_json", "invalid_type", "an object or a string"),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_grammar", "exactly one"),
        (
            {"structured_outputs": {"regex": "a"}, "guided_choice": ["a"]},
            "structured_outputs",
            "invalid_grammar",
            "cannot go with 'guided_choice'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
            "schema",
        ),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "invalid_value", "the end"),
    ],
)
def test_refused(
    http: TestClient, engine: FakeClient, fields: Any, param: str, code: str, reason: str
) -> None:
    answer = post(http, CHAT, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert reason in error["message"] and engine.num_running == 0


def test_a_stream_refuses_with_a_status(http: TestClient) -> None:
    answer = post(http, CHAT, stream=True, guided_json={"uniqueItems": True})
    assert answer.status_code == 400 and "uniqueItems" in answer.json()["error"]["message"]
