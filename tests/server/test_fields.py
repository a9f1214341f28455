"""Fields beyond the prompt: those without effect, those refused by name, those for the template."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.sampling_params import SamplingParams
from server.openai import refused
from server.openai.schemas import ChatCompletionRequest, CompletionRequest, SamplingRequest
from tests.server.fake_client import ANSWER, FakeClient
from tests.server.sse import events

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"prompt": "Hi"},
    RESPONSES: {"input": "Hi"},
}
EMBEDDINGS: dict[str, Any] = {"input": "Hi"}
WITHOUT_EFFECT: dict[str, Any] = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "length_penalty": 1.0,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
    "session_id": "s",
    "spaces_between_special_tokens": True,
}


def post(http: TestClient, path: str, **fields: Any) -> Any:
    return http.post(path, json={"model": "fake"} | BODIES.get(path, EMBEDDINGS) | fields)


NOT_FOR_REQUESTS = {"output_kind", "detokenize", "embed", "thoughts"}  # routes set these


def test_every_sampling_parameter_can_be_asked_for() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names - NOT_FOR_REQUESTS <= ChatCompletionRequest.model_fields.keys()
    own = {"thinking_token_budget"}  # of chats: texts have no form for thoughts
    assert names - NOT_FOR_REQUESTS - own <= CompletionRequest.model_fields.keys()


@pytest.mark.parametrize("path", BODIES)
def test_known_fields_without_effect_pass_even_strict_servers(
    serve: Callable[..., TestClient], engine: FakeClient, path: str
) -> None:
    assert WITHOUT_EFFECT.keys() <= SamplingRequest.model_fields.keys()
    http = serve(strict_params=True)
    plain, noted = post(http, path), post(http, path, **WITHOUT_EFFECT)
    assert (plain.status_code, noted.status_code) == (200, 200), noted.text
    assert engine.params[0] == engine.params[1]


@pytest.mark.parametrize(
    ("path", "table"),
    [(CHAT, refused.CHAT), (COMPLETIONS, refused.COMPLETION), (RESPONSES, refused.RESPONSE)],
)
def test_known_fields_that_are_not_honoured_are_refused(
    http: TestClient, engine: FakeClient, path: str, table: dict[str, str]
) -> None:
    for name, instead in table.items():
        response = post(http, path, **{name: {"a": 1}})
        assert response.status_code == 400, name
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert instead in error["message"]
    assert not engine.prompts


@pytest.mark.parametrize("salt", ["", "x" * 65, "a/b", "a\0", "\N{SNOWMAN}", 7, "a\n"])
@pytest.mark.parametrize("path", BODIES)
def test_cache_salts(http: TestClient, path: str, salt: object) -> None:
    response = post(http, path, cache_salt=salt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "cache_salt"


@pytest.mark.parametrize("path", [*BODIES, "/v1/embeddings"])
def test_the_cache_salt_goes_with_the_request(
    http: TestClient, engine: FakeClient, path: str
) -> None:
    for more in ({"cache_salt": "tenant_1-x"}, {"cache_salt": None}, {}):
        post(http, path, **more)
    assert engine.cache_salts == ["tenant_1-x", "", ""]


def test_continuous_usage(http: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path in (CHAT, COMPLETIONS):
        chunks, done = events(post(http, path, stream=True, stream_options=options).text)
        assert done
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[0] <= 1
        assert counts[-1] == counts[-2] == len(ANSWER.encode()) + 1


def test_obfuscation_is_not_added(http: TestClient) -> None:
    response = post(http, CHAT, stream=True, stream_options={"include_obfuscation": True})
    assert response.json()["error"]["param"] == "stream_options.include_obfuscation"
    options = {"include_obfuscation": False}
    assert post(http, CHAT, stream=True, stream_options=options).status_code == 200


def test_errors_name_the_field_that_was_sent(http: TestClient) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        error = post(http, CHAT, **{name: 300}).json()["error"]
        assert (error["param"], error["code"]) == (name, "context_length_exceeded")


def test_modalities(http: TestClient) -> None:
    assert post(http, CHAT, modalities=["text"]).status_code == 200
    assert post(http, CHAT, modalities=["text", "audio"]).status_code == 400


def with_template(engine: FakeClient, source: str) -> None:
    engine.tokenizer = type(engine.tokenizer)(engine.tokenizer.backend, chat_template=source)


def test_an_assistant_without_content_breaks_no_template(
    http: TestClient, engine: FakeClient
) -> None:
    with_template(
        engine,
        "{% for m in messages %}{{ '[' + m['content'] + ']' }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}"
        "{% endfor %}",
    )
    function = {"name": "f", "arguments": '{"city": "Ulm"}'}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    assert post(http, CHAT, messages=messages).status_code == 200
    assert engine.prompts == ["[Hi][][][]Ulm[3]"]


@pytest.mark.parametrize("arguments", ["", "not JSON", "[" * 50, 7, None, {"a": 1}])
def test_odd_calls_do_no_harm(http: TestClient, arguments: object) -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": arguments}}, {"function": 3}, {}]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "x", "tool_calls": calls},
    ]
    assert post(http, CHAT, messages=messages).status_code == 200
    for odd in ("x", 3, {"a": 1}, [4]):
        response = post(http, CHAT, messages=[*messages, messages[1] | {"tool_calls": odd}])
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith("messages[2].tool_calls")


def test_half_a_character_in_a_calls_arguments(http: TestClient, engine: FakeClient) -> None:
    with_template(engine, "{{ messages[0].tool_calls[0].function.arguments }}")
    function = {"name": "f", "arguments": '{"a": "\\ud800"}'}
    message = {"role": "assistant", "tool_calls": [{"function": function}]}
    assert post(http, CHAT, messages=[message]).status_code == 200
    assert engine.prompts == [function["arguments"]]  # it stays text


def test_the_template_gets_the_variables_that_it_reads(
    http: TestClient, engine: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    with_template(
        engine,
        "{% if enable_thinking is false %}quick{% endif %}{{ reasoning_effort }}"
        "{% set other = 'mine' %}{{ other }}",
    )
    given = {"enable_thinking": False, "other": "theirs", "unread": 1}
    response = post(http, CHAT, chat_template_kwargs=given, reasoning_effort="low")
    assert response.status_code == 200
    assert engine.prompts == ["quicklowmine"]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("chat_template_kwargs.unread" in line for line in said)
    assert not any("enable_thinking" in line for line in said)


def test_what_may_be_long_is_written_beside_the_event_loop(
    http: TestClient, engine: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    render = engine.tokenizer.apply_chat_template

    def noted(*args: Any, **kwargs: Any) -> str:
        threads.append(threading.current_thread().name)
        return render(*args, **kwargs)

    monkeypatch.setattr(engine.tokenizer, "apply_chat_template", noted)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    (question,) = BODIES[CHAT]["messages"]
    for more in ({}, {"tools": [tool]}, {"messages": [question, call]},
                 {"messages": [question | {"content": "x" * 20_001}]}):  # fmt: skip
        post(http, CHAT, **more)
    assert [name.startswith("aside_") for name in threads] == [False, True, True, True]


def test_lm_eval_scores_prompts_of_ids(http: TestClient) -> None:
    response = post(
        http,
        COMPLETIONS,
        prompt=[[72, 105], [72]],
        max_tokens=0,
        echo=True,
        logprobs=1,
        temperature=0.0,
        seed=1234,
    )
    choices = response.json()["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [2, 1]
    assert choices[0]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert response.json()["usage"]["completion_tokens"] == 0
