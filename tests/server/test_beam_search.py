"""use_beam_search over the fake engine: its most likely token is always the answer's next byte."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from server.openai.answers import ChatCompletion, Completion
from tests.server.fake_client import ANSWER, EOS_ID, FakeClient

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "Hi", "use_beam_search": True, "max_tokens": 3} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": MESSAGES, "use_beam_search": True} | fields


def test_completions(http: TestClient, engine: FakeClient) -> None:
    """Every request is answered with "H" or, less likely by a factor of e, "b"."""
    body = completion(n=2, best_of=3, logprobs=1, temperature=0, prompt=["Hi", "Ho"])
    answer = http.post(COMPLETIONS, json=body).json()
    Completion.model_validate(answer)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0] == texts[2] == "HHH" and texts[1] == texts[3]
    assert sorted(texts[1]) == ["H", "H", "b"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    best = answer["choices"][0]
    assert best["finish_reason"] == "length"
    assert best["logprobs"]["token_logprobs"] == [-0.5] * 3
    assert best["logprobs"]["top_logprobs"] == [{"H": -0.5}] * 3
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens"] == 4
    assert {params.logprobs for params in engine.params} == {6}
    assert [len(prompt) for prompt in engine.prompts if not isinstance(prompt, str)][-1] == 4
    assert engine.num_running == 0 and not engine.aborted


def test_chat_ends_at_the_end_of_the_text(http: TestClient, engine: FakeClient) -> None:
    engine._answer_ids = []
    body = chat(n=1, best_of=2, length_penalty=0.5, cache_salt="mine", logprobs=True)
    answer = http.post(CHAT, json=body).json()
    ChatCompletion.model_validate(answer)
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "" and choice["finish_reason"] == "stop"
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == [-0.5]
    assert set(engine.cache_salts) == {"mine"}
    assert engine.prompts[-1][-1] != EOS_ID  # what has ended is not gone on with


def test_a_beam_that_fails_ends_all(http: TestClient, engine: FakeClient) -> None:
    engine.finish_reason = "error"
    response = http.post(COMPLETIONS, json=completion(n=2))
    assert response.status_code == 500 and engine.num_running == 0


def test_too_long(http: TestClient) -> None:
    response = http.post(COMPLETIONS, json=completion(max_tokens=255))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"stop": "x"}, "stop"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 11}, "n"),
        ({"best_of": 11}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
    ],
)
def test_what_cannot_go_with_it(
    http: TestClient, engine: FakeClient, fields: dict[str, Any], param: str
) -> None:
    response = http.post(COMPLETIONS, json=completion(**fields))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.params == []
    assert ANSWER not in response.text
