"""POST /v1/chat/completions: answers, streams, log-probabilities, what reaches the engine."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.errors import EngineDeadError, RequestFailedError
from tests.server.fake_client import ANSWER, OTHER_ID, FakeClient
from tests.server.sse import events

PATH = "/v1/chat/completions"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def ask(http: TestClient, **fields: Any) -> dict[str, Any]:
    response = http.post(PATH, json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: TestClient, **fields: Any) -> list[dict[str, Any]]:
    response = http.post(PATH, json=BODY | fields | {"stream": True})
    assert response.status_code == 200, response.text
    chunks, done = events(response.text)
    assert done
    return chunks


def test_answer(http: TestClient, engine: FakeClient) -> None:
    answer = ask(http)
    assert engine.prompts == [PROMPT]
    assert engine.add_special_tokens == [False]
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert engine.request_ids == [f"{answer['id']}-0"]
    assert answer["model"] == "fake"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    prompt, completion = len(engine.tokenizer.encode(PROMPT)), len(ANSWER.encode()) + 1
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_sampling_parameters_reach_the_engine(http: TestClient, engine: FakeClient) -> None:
    given = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": -3,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"65": -100},
        "allowed_token_ids": [65, 66],
        "bad_words": ["x"],
        "stop": "zz",
        "stop_token_ids": [3],
        "ignore_eos": True,
        "min_tokens": 1,
        "max_completion_tokens": 5,
        "max_tokens": 9,
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    ask(http, **given, priority=4, user="me", metadata={"a": "b"}, store=False)
    (params,) = engine.params
    for name in given.keys() - {"max_completion_tokens", "max_tokens", "logit_bias", "stop"}:
        wanted = given[name]
        assert getattr(params, name) == (tuple(wanted) if isinstance(wanted, list) else wanted)
    assert params.max_tokens == 5
    assert params.logit_bias == {65: -100.0}
    assert params.stop == ("zz",)
    assert engine.priorities == [4]


def test_nulls_are_defaults(http: TestClient, engine: FakeClient) -> None:
    ask(http, temperature=None, n=None, stop=None, max_tokens=None, seed=None, tools=None)
    (params,) = engine.params
    assert (params.temperature, params.n, params.stop, params.max_tokens) == (1.0, 1, None, None)


def test_stop_string(http: TestClient) -> None:
    (choice,) = ask(http, stop=[", w"])["choices"]
    assert choice["message"]["content"] == "Hello"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ", w")


def test_max_tokens(http: TestClient) -> None:
    (choice,) = ask(http, max_tokens=4)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hell", "length")


def test_n(http: TestClient) -> None:
    answer = ask(http, n=3, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 6


def test_best_of(http: TestClient, engine: FakeClient) -> None:
    (choice,) = ask(http, best_of=3, max_tokens=2)["choices"]
    assert (choice["index"], choice["logprobs"]) == (0, None)
    assert engine.params[0].n == 3


def test_content_parts_system_and_continuation(http: TestClient, engine: FakeClient) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "Well"},
    ]
    ask(http, messages=messages, continue_final_message=True)
    assert engine.prompts == [
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\nWell"
    ]


def test_generation_prompt_can_be_left_out(http: TestClient, engine: FakeClient) -> None:
    ask(http, add_generation_prompt=False)
    assert engine.prompts == ["<|im_start|>user\nHi<|im_end|>\n"]


@pytest.mark.parametrize("name", ["self", "source", "variables", "kwargs"])
def test_template_variables_may_have_any_name(http: TestClient, name: str) -> None:
    ask(http, chat_template_kwargs={name: 1})


def test_logprobs(http: TestClient, engine: FakeClient) -> None:
    (choice,) = ask(http, logprobs=True, top_logprobs=2, max_tokens=9)["choices"]
    content = choice["logprobs"]["content"]
    other = engine.tokenizer.token_to_bytes(OTHER_ID)
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": other.decode(), "logprob": -1.5, "bytes": list(other)},
        ],
    }
    assert bytes(b for entry in content for b in entry["bytes"]) == ANSWER.encode()[:9]


def test_logprobs_without_alternatives(http: TestClient) -> None:
    (choice,) = ask(http, logprobs=True, max_tokens=1)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_prompt_logprobs(http: TestClient) -> None:
    answer = ask(http, prompt_logprobs=1, max_tokens=1)
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_stream(http: TestClient) -> None:
    response = http.post(PATH, json=BODY | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    chunks, done = events(response.text)
    assert done
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}
    text = "".join(choice["delta"]["content"] for choice in choices[1:-1])
    assert text == ANSWER
    assert "usage" not in chunks[0]


def test_stream_with_usage(http: TestClient) -> None:
    chunks = stream(http, stream_options={"include_usage": True}, max_tokens=3)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_stream_of_several(http: TestClient) -> None:
    chunks = stream(http, n=3)
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == ANSWER
        assert [choice["finish_reason"] for choice in mine].count("stop") == 1


def test_stream_of_logprobs_matches_the_whole(http: TestClient) -> None:
    fields = {"logprobs": True, "top_logprobs": 1}
    whole = ask(http, **fields)["choices"][0]["logprobs"]["content"]
    chunks = stream(http, **fields)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == whole


def test_stream_hides_a_stop_string(http: TestClient) -> None:
    chunks = stream(http, stop="wör")
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello, "


def test_error_before_the_first_token_has_its_status(http: TestClient, engine: FakeClient) -> None:
    engine.fail_with = EngineDeadError("It died.")
    response = http.post(PATH, json=BODY | {"stream": True})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"


@pytest.mark.parametrize("error", [EngineDeadError("It died."), ZeroDivisionError("secret")])
def test_error_in_a_stream_ends_it(http: TestClient, engine: FakeClient, error: Exception) -> None:
    engine.fail_with, engine.fail_at = error, 3
    response = http.post(PATH, json=BODY | {"stream": True})
    assert response.status_code == 200
    chunks, done = events(response.text)
    assert not done
    assert ["error" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    expected = "engine_unavailable" if isinstance(error, EngineDeadError) else "internal_error"
    assert chunks[-1]["error"]["code"] == expected
    assert "secret" not in response.text


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("reason", ["error", "abort"])
def test_a_forced_end_is_an_error(
    http: TestClient, engine: FakeClient, reason: str, streamed: bool
) -> None:
    engine.finish_reason = reason
    response = http.post(PATH, json=BODY | {"stream": streamed, "max_tokens": 2})
    if streamed:
        chunks, done = events(response.text)
        assert not done
        error = chunks[-1]["error"]
    else:
        assert response.status_code == RequestFailedError.status
        assert response.headers["x-should-retry"] == "false"
        error = response.json()["error"]
    assert error["code"] == "request_failed"


def test_an_output_that_just_ends_is_an_error(
    http: TestClient, engine: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*args: object, **kwargs: object) -> Any:
        for item in ():
            yield item

    monkeypatch.setattr(engine, "generate", nothing)
    response = http.post(PATH, json=BODY | {"stream": True})
    assert response.status_code == 500


def test_tools_reach_the_template(http: TestClient, engine: FakeClient) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    ask(http, tools=tools, tool_choice="auto")
    source = "{{ tools | length if tools else 'none' }}"
    engine.tokenizer = type(engine.tokenizer)(engine.tokenizer.backend, chat_template=source)
    ask(http, tools=tools)
    ask(http, tools=tools, tool_choice="none")
    assert engine.prompts[1:] == ["1", "none"]
