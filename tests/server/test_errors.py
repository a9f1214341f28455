"""Bad input: the whole table of errors, and bodies from hell."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.errors import JaxLLMError, RecompilationError, RequestFailedError
from tests.server.fake_client import FakeClient

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
JSON = {"content-type": "application/json"}


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["code"] is None or isinstance(body["error"]["code"], str)
    return body["error"]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": MESSAGES} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "Hi"} | fields


ROWS: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    (CHAT, {"messages": MESSAGES}, 400, "model", "missing_required_parameter"),
    (CHAT, {"model": "fake"}, 400, "messages", "missing_required_parameter"),
    (COMPLETIONS, {"model": "fake"}, 400, "prompt", "missing_required_parameter"),
    (CHAT, chat(messages=[{}]), 400, "messages[0].role", "missing_required_parameter"),
    (
        CHAT,
        chat(messages=[*MESSAGES, {"role": "user"}]),
        400,
        "messages[1].content",
        "missing_required_parameter",
    ),
    (CHAT, chat(messages=[]), 400, "messages", "empty_array"),
    (CHAT, chat(messages="Hi"), 400, "messages", "invalid_type"),
    (CHAT, chat(messages=["Hi"]), 400, "messages[0]", "invalid_type"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": 1}]),
        400,
        "messages[0].content",
        "invalid_type",
    ),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": ["Hi"]}]),
        400,
        "messages[0].content[0]",
        "invalid_type",
    ),
    (
        CHAT,
        chat(messages=[{"role": "robot", "content": "x"}]),
        400,
        "messages[0].role",
        "invalid_value",
    ),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "messages[0].content[0]",
        "unsupported_content_type",
    ),
    (CHAT, chat(max_tokens=1.5), 400, "max_tokens", "invalid_type"),
    (CHAT, chat(max_tokens=True), 400, "max_tokens", "invalid_type"),
    (CHAT, chat(max_tokens="7"), 400, "max_tokens", "invalid_type"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens", "integer_below_min_value"),
    (CHAT, chat(max_completion_tokens=-1), 400, "max_completion_tokens", "integer_below_min_value"),
    (CHAT, chat(temperature="hot"), 400, "temperature", "invalid_type"),
    (CHAT, chat(temperature=False), 400, "temperature", "invalid_type"),
    (CHAT, chat(temperature=101), 400, "temperature", "decimal_above_max_value"),
    (CHAT, chat(temperature=-0.1), 400, "temperature", "decimal_below_min_value"),
    (CHAT, chat(top_p=0), 400, "top_p", "decimal_below_min_value"),
    (CHAT, chat(n=0), 400, "n", "integer_below_min_value"),
    (CHAT, chat(n=10**9), 400, "n", "integer_above_max_value"),
    (CHAT, chat(seed=2**63), 400, "seed", "integer_above_max_value"),
    (CHAT, chat(stream="yes"), 400, "stream", "invalid_type"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options", "invalid_value"),
    (
        CHAT,
        chat(stream=True, stream_options={"include_usage": 1}),
        400,
        "stream_options.include_usage",
        "invalid_type",
    ),
    (CHAT, chat(logprobs=1), 400, "logprobs", "invalid_type"),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs", "invalid_value"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "integer_above_max_value"),
    (CHAT, chat(stream=True, prompt_logprobs=1), 400, "prompt_logprobs", "invalid_value"),
    (CHAT, chat(stop=[1]), 400, "stop[0]", "invalid_type"),
    (CHAT, chat(stop={"a": 1}), 400, "stop", "invalid_type"),
    (CHAT, chat(stop=["x"] * 257), 400, "stop", "array_above_max_length"),
    (CHAT, chat(stop=""), 400, "stop", "empty_string"),
    (CHAT, chat(logit_bias={"a": 1}), 400, "logit_bias", "invalid_value"),
    (CHAT, chat(logit_bias={"01": 1}), 400, "logit_bias", "invalid_value"),
    (CHAT, chat(logit_bias={" 1": 1}), 400, "logit_bias", "invalid_value"),
    (CHAT, chat(logit_bias={"\u0661": 1}), 400, "logit_bias", "invalid_value"),
    (CHAT, chat(logit_bias={"1": 101}), 400, "logit_bias", "invalid_value"),
    (CHAT, chat(logit_bias={"1": None}), 400, "logit_bias.1", "invalid_type"),
    (CHAT, chat(logit_bias={"99999": 1}), 400, "logit_bias", "invalid_value"),
    (CHAT, chat(allowed_token_ids=[]), 400, "allowed_token_ids", "invalid_value"),
    (CHAT, chat(min_tokens=9, max_tokens=3), 400, "min_tokens", "invalid_value"),
    (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type", "invalid_value"),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice", "invalid_value"),
    (CHAT, chat(tool_choice="sometimes"), 400, "tool_choice", "unsupported_value"),
    (CHAT, chat(tool_choice={"type": "function"}), 400, "tool_choice", "unsupported_value"),
    (CHAT, chat(chat_template="{{ 1 }}"), 400, "chat_template", "unsupported_parameter"),
    (
        CHAT,
        chat(chat_template_kwargs={"chat_template": "x"}),
        400,
        "chat_template_kwargs",
        "unsupported_value",
    ),
    (
        CHAT,
        chat(chat_template_kwargs={"x": {"y": 1}}),
        400,
        "chat_template_kwargs",
        "unsupported_value",
    ),
    (
        CHAT,
        chat(continue_final_message=True, add_generation_prompt=True),
        400,
        "continue_final_message",
        "invalid_value",
    ),
    (CHAT, chat(guided_json={"not": {}}), 400, "guided_json", "invalid_grammar"),
    (CHAT, chat(json_schema="{}"), 400, "json_schema", "unsupported_parameter"),
    (COMPLETIONS, completion(suffix="end"), 400, "suffix", "unsupported_parameter"),
    (COMPLETIONS, completion(prompt=[]), 400, "prompt", "empty_array"),
    (COMPLETIONS, completion(prompt=""), 400, "prompt", "empty_prompt"),
    (COMPLETIONS, completion(prompt={"a": 1}), 400, "prompt", "invalid_type"),
    (COMPLETIONS, completion(prompt=[1, "a"]), 400, "prompt[1]", "invalid_type"),
    (COMPLETIONS, completion(prompt=[True]), 400, "prompt[0]", "invalid_type"),
    (COMPLETIONS, completion(prompt=[[1], ["a"]]), 400, "prompt[1][0]", "invalid_type"),
    (COMPLETIONS, completion(prompt=[-1]), 400, "prompt", "invalid_value"),
    (COMPLETIONS, completion(prompt=["x"] * 1025), 400, "prompt", "array_above_max_length"),
    (COMPLETIONS, completion(prompt=["x"] * 9, n=128), 400, "n", "invalid_value"),
    (COMPLETIONS, completion(logprobs=21), 400, "logprobs", "integer_above_max_value"),
    (COMPLETIONS, completion(logprobs=True), 400, "logprobs", "invalid_type"),
    (COMPLETIONS, completion(prompt="x" * 300), 400, "prompt", "context_length_exceeded"),
    (COMPLETIONS, completion(max_tokens=300), 400, "max_tokens", "context_length_exceeded"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": "x" * 300}]),
        400,
        "messages",
        "context_length_exceeded",
    ),
    (CHAT, chat(model="gpt-5"), 404, "model", "model_not_found"),
    (CHAT, chat(model=None), 400, "model", "invalid_type"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: json.dumps(row[1])[:60])
def test_field_errors(
    http: TestClient,
    engine: FakeClient,
    row: tuple[str, dict[str, Any], int, str | None, str | None],
) -> None:
    path, body, status, param, code = row
    response = http.post(path, json=body)
    error = error_of(response)
    assert response.status_code == status
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert response.headers["x-request-id"]
    assert engine.num_running == 0


def test_messages_are_openais(http: TestClient) -> None:
    def message(**fields: Any) -> str:
        return error_of(http.post(CHAT, json=chat(**fields)))["message"]

    assert message(max_tokens=1.5) == (
        "Invalid type for 'max_tokens': expected an integer, but got a decimal number instead."
    )
    assert message(messages=[{"content": "x"}]) == "Missing required parameter: 'messages[0].role'."
    assert message(temperature=200) == (
        "Invalid 'temperature': decimal above maximum value. "
        "Expected a value <= 100, but got 200 instead."
    )
    assert message(max_tokens=2**31) == (
        "Invalid 'max_tokens': integer above maximum value. "
        "Expected a value <= 2147483647, but got 2147483648 instead."
    )
    assert message(stop=["a", ""]) == "Invalid 'stop[1]': it must not be empty."


MALFORMED = [
    b"",
    b"{",
    b"[",
    b"null",
    b"[]",
    b'"text"',
    b"1",
    b"{}{}",
    b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "fake", "messages": [{"role": "user", "content": "\xff"}]}',
    b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], "seed": Infinity}',
    b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], "seed": 1e999}',
    b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], "n": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"model": "fake", "tools": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"model": "fake", "messages": [' + b"1," * 500_000 + b"1]}",
    b'{"model": "fake", "messages": ' + b'[{"role": []}]}',
    '{"model": "fake"}'.encode("utf-16"),
    b"\xef\xbb\xbf" + b'{"model": "fake"}',
    b"model=fake&messages=x",
    b"\x00" * 100,
    b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], "logit_bias": {"": 1}}',
    b'{"model": {"$ref": "x"}, "messages": {}}',
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:40]))
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_malformed_bodies(http: TestClient, path: str, body: bytes) -> None:
    response = http.post(path, content=body, headers=JSON)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1000
    for leak in ("Traceback", 'File "', "/site-packages/", "pydantic"):
        assert leak not in error["message"]


def test_invalid_json_says_so(http: TestClient) -> None:
    error = error_of(http.post(CHAT, content=b'{"a": }', headers=JSON))
    assert error["code"] == "invalid_json"
    assert "line 1 column 7" in error["message"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_media_types(http: TestClient, media_type: str) -> None:
    response = http.post(CHAT, content=b"{}", headers={"content-type": media_type})
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"


def test_compressed_bodies_are_refused(http: TestClient) -> None:
    response = http.post(CHAT, content=b"{}", headers=JSON | {"content-encoding": "gzip"})
    assert response.status_code == 415


def test_charset_is_accepted(http: TestClient) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    assert http.post(CHAT, content=json.dumps(chat()), headers=headers).status_code == 200


def test_unknown_url(http: TestClient) -> None:
    for path in ("/", "/v1", "/v1/chat/completions/", "/v1/audio/speech", "/docs"):
        response = http.post(path, json={})
        assert response.status_code == 404
        assert error_of(response)["code"] == "unknown_url"


def test_wrong_method(http: TestClient) -> None:
    response = http.get(CHAT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert error_of(response)["code"] == "method_not_allowed"
    assert http.delete("/v1/models").status_code == 405


def test_unforeseen_errors_tell_nothing(
    http: TestClient, engine: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_with = ZeroDivisionError("a secret at 0xdeadbeef")
    response = http.post(CHAT, json=chat(), headers={"x-request-id": "my-id"})
    assert response.status_code == 500
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "secret" not in response.text
    assert "my-id" in error["message"]
    assert response.headers["x-request-id"] == "my-id"
    assert response.headers["x-should-retry"] == "false"
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "my-id" in record.getMessage()
    assert record.exc_info


@pytest.mark.parametrize("error", [JaxLLMError("inside"), RecompilationError("shape (3, 4)")])
def test_internal_errors_tell_nothing(
    http: TestClient, engine: FakeClient, error: JaxLLMError
) -> None:
    engine.fail_with = error
    response = http.post(CHAT, json=chat())
    assert response.status_code == 500
    assert error.message not in response.text


def test_a_poisonous_request_is_not_to_be_sent_again(http: TestClient, engine: FakeClient) -> None:
    engine.fail_with = RequestFailedError("Its logits are not finite.")
    response = http.post(CHAT, json=chat())
    assert response.status_code == 500
    assert error_of(response)["code"] == "request_failed"
    assert response.headers["x-should-retry"] == "false"


def test_unknown_fields_are_logged_once(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert http.post(CHAT, json=chat(frobnicate="low")).status_code == 200
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == ["Ignoring the unknown request field 'frobnicate'"]


def test_strict_params_refuse_unknown_fields(serve: Callable[..., TestClient]) -> None:
    response = serve(strict_params=True).post(CHAT, json=chat(frobnicate="low"))
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == ("frobnicate", "unknown_parameter")


def test_refused_fields_that_say_nothing_are_fine(http: TestClient) -> None:
    body = completion(suffix=None, best_of=None, use_beam_search=False)
    assert http.post(COMPLETIONS, json=body).status_code == 200
