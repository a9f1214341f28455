"""POST /v1/completions: prompt forms, echo, log-probabilities, streams."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.outputs import CompletionOutput
from server.openai.reply import best
from tests.server.fake_client import ANSWER, FakeClient
from tests.server.sse import events

PATH = "/v1/completions"
BODY = {"model": "fake", "prompt": "Say", "max_tokens": 100}


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
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["index"]) == (ANSWER, "stop", 0)
    assert answer["usage"]["prompt_tokens"] == 3
    assert engine.add_special_tokens == [True]


def test_sixteen_tokens_unless_asked(http: TestClient, engine: FakeClient) -> None:
    http.post(PATH, json={"model": "fake", "prompt": "x"})
    assert engine.params[0].max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_prompt_forms(
    http: TestClient, engine: FakeClient, prompt: object, seen: list[Any], n: int
) -> None:
    answer = ask(http, prompt=prompt, n=n, max_tokens=2)
    assert engine.prompts == seen
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(seen) * n))
    assert answer["usage"]["completion_tokens"] == 2 * n * len(seen)
    assert answer["usage"]["prompt_tokens"] == sum(len(item) for item in seen)
    assert len(set(engine.request_ids)) == len(seen)


def test_the_best_of_several(http: TestClient, engine: FakeClient) -> None:
    answer = ask(http, prompt=["a", "b"], n=2, best_of=3, max_tokens=2)
    assert engine.params[0].n == 3 and engine.params[0].logprobs == 0
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["logprobs"] for choice in answer["choices"]} == {None}
    assert answer["usage"]["completion_tokens"] == 2 * 3 * 2
    stream(http, best_of=1)
    assert engine.params[-1].n == 1 and engine.params[-1].logprobs is None


def test_the_best_has_the_likeliest_tokens() -> None:
    """By the token, so that long answers are not worse ones."""
    scored = [("a", 1, -1.0), ("b", 4, -2.0), ("c", 2, -3.0)]
    completions = [
        CompletionOutput(i, text, [0] * length, logprob)
        for i, (text, length, logprob) in enumerate(scored)
    ]
    assert [(c.index, c.text) for c in best(completions, 2)] == [(0, "b"), (1, "a")]
    assert [c.text for c in best(completions, 3)] == ["a", "b", "c"]


def test_stream(http: TestClient) -> None:
    chunks = stream(http, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == ANSWER
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]].count("stop") == 1
    assert chunks[-1]["usage"]["total_tokens"] == 3 + len(ANSWER.encode()) + 1


def test_stream_of_several_prompts(http: TestClient) -> None:
    chunks = stream(http, prompt=["ab", "c"], n=2, echo=True, max_tokens=5)
    texts = {index: "" for index in range(4)}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "abHello", 1: "abHello", 2: "cHello", 3: "cHello"}


def test_echo_with_logprobs(http: TestClient) -> None:
    (choice,) = ask(http, prompt="ä b", echo=True, logprobs=1, max_tokens=10)["choices"]
    assert choice["text"] == "ä bHello, wö"
    scored = choice["logprobs"]
    assert scored["tokens"][:5] == ["bytes:\\xc3", "bytes:\\xa4", " ", "b", "H"]
    assert scored["token_logprobs"] == [None] + [-0.5] * 13
    assert scored["top_logprobs"][0] is None
    assert scored["top_logprobs"][4]["H"] == -0.5
    # Each token begins where its first character does; the rest of a character has its end.
    assert scored["text_offset"] == [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_special_tokens_in_an_echoed_prompt_count_as_text(
    http: TestClient, engine: FakeClient
) -> None:
    special = engine.tokenizer.decode([257], skip_special_tokens=False)
    prompt = f"a{special}b"
    (choice,) = ask(http, prompt=prompt, echo=True, logprobs=0, max_tokens=1)["choices"]
    assert choice["text"].startswith(prompt)
    length = len(special)
    assert choice["logprobs"]["text_offset"] == [0, 1, 1 + length, 2 + length]


def test_echo_of_ids_scores_a_prompt_only(http: TestClient) -> None:
    (choice,) = ask(http, prompt=[39, 40], echo=True, logprobs=0, max_tokens=0)["choices"]
    assert len(choice["text"]) == 2
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]


def test_stream_with_echo_and_logprobs_matches_the_whole(http: TestClient) -> None:
    fields = {"echo": True, "logprobs": 2, "n": 2}
    whole = ask(http, **fields)["choices"]
    chunks = stream(http, **fields)
    for choice in whole:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for key, values in choice["logprobs"].items():
            scored = [part["logprobs"][key] for part in parts if part["logprobs"]]
            assert [value for part in scored for value in part] == values


def test_prompt_logprobs(http: TestClient) -> None:
    (choice,) = ask(http, prompt="abc", prompt_logprobs=1, max_tokens=1)["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert [sorted(entry["rank"] for entry in other.values()) for other in others] == [[1], [1]]
    assert choice["logprobs"] is None


def test_special_tokens_may_be_kept_off(http: TestClient, engine: FakeClient) -> None:
    ask(http, add_special_tokens=False)
    assert engine.add_special_tokens == [False]


def test_one_bad_prompt_ends_all(http: TestClient, engine: FakeClient) -> None:
    engine.step_seconds = 0.01
    response = http.post(PATH, json=BODY | {"prompt": [[1], [2], [9999]], "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert engine.num_running == 0
    assert len(engine.aborted) == 2
