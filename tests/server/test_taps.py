"""``taps`` and ``interventions`` over HTTP: fields, refusals, what an answer brings."""

import base64
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from starlette.testclient import TestClient

from jaxllm.config.model import RowParam
from jaxllm.taps.interventions import AblateHead, Patch, Steer
from jaxllm.taps.sites import TapShapes
from server.anthropic.answers import Message
from server.app import create_app
from server.openai.answers import ChatCompletion, Completion, ResponseObject
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient

SHAPES = TapShapes(num_layers=2, num_heads=2, hidden_size=3, vocab_size=258)
VECTOR = base64.b64encode(np.array([1, 2, 3], "<f4").tobytes()).decode()
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def tapped(engine: FakeClient) -> FakeClient:
    params = (RowParam("rate", None, False), RowParam("span", 2, False))
    info = msgspec.structs.replace(engine.info, taps=SHAPES, attention_params=params)
    return FakeClient(engine.tokenizer, info)


Ask = Callable[..., Any]
OTHERS = [("responses", {"input": "Hi"}), ("messages", CHAT | {"max_tokens": 3})]


@pytest.fixture
def ask(tapped: FakeClient) -> Ask:
    http = TestClient(create_app(tapped, ServerSettings(served_model_names=("fake",))))

    def post(chat: bool = False, **fields: Any) -> Any:
        path, body = ("chat/completions", CHAT) if chat else ("completions", {"prompt": "Hello"})
        return http.post(f"/v1/{path}", json={"model": "fake", "max_tokens": 3} | body | fields)

    return post


def test_an_answer_brings_arrays(ask: Ask) -> None:
    answer = ask(taps=["resid.2", "attn_probs.0"], tap_positions=[0, -1]).json()
    (choice,) = Completion.model_validate(answer).choices
    assert choice.taps is not None and set(choice.taps) == {"resid.2", "attn_probs.0"}
    for name, shape in (("resid.2", [2, 3]), ("attn_probs.0", [2, 2, 5])):
        tap = choice.taps[name]
        assert (tap.positions, tap.shape) == ([0, 4], shape)
        values = np.frombuffer(base64.b64decode(tap.data), "<f4").reshape(shape)
        assert (values[1] == 4).all() and (values[0].reshape(-1)[1:2] == 0).all()
    chat = ask(chat=True, taps=["logits.0"]).json()
    (message,) = ChatCompletion.model_validate(chat).choices
    assert message.taps is not None and message.taps["logits.0"].shape == [1, 258]
    assert "taps" not in ask().json()["choices"][0]


def test_interventions_reach_the_engine(ask: Ask, tapped: FakeClient) -> None:
    asked = [
        {"type": "steer", "layer": 2, "vector": VECTOR, "coefficient": -2, "first": 3},
        {"type": "patch", "layer": 0, "position": 1, "vector": [1, 2.5, 3]},
        {"type": "ablate_head", "layer": 1, "head": 1},
    ]
    for chat in (False, True):
        assert ask(chat, interventions=asked, stream=True).status_code == 200
        assert tapped.params[-1].interventions == (
            Steer(2, [1, 2, 3], -2.0, 3),
            Patch(0, 1, [1, 2.5, 3]),
            AblateHead(1, 1),
        )


def test_attention_params_reach_the_engine(ask: Ask, tapped: FakeClient) -> None:
    for chat in (False, True):
        assert ask(chat, attention_params={"rate": 2, "span": [1, 2.5]}).status_code == 200
        assert tapped.params[-1].attention_params == {"rate": 2.0, "span": (1.0, 2.5)}


@pytest.mark.parametrize(("path", "body"), OTHERS, ids=["responses", "messages"])
def test_the_other_apis_have_them_too(tapped: FakeClient, path: str, body: dict[str, Any]) -> None:
    http = TestClient(create_app(tapped, ServerSettings(served_model_names=("fake",))))

    def post(**fields: Any) -> Any:
        return http.post(f"/v1/{path}", json={"model": "fake"} | body | fields)

    answer = post(taps=["logits.0"], interventions=[STEER]).json()
    taps = (ResponseObject if path == "responses" else Message).model_validate(answer).taps
    assert taps is not None and taps["logits.0"].shape == [1, 258]
    assert tapped.params[-1].interventions == (Steer(0, [1, 2, 3]),)
    assert "taps" not in post().json()
    for fields, words in (
        ({"taps": ["resid.0"], "stream": True}, "stream"),
        ({"taps": ["resid.3"]}, "resid.0 to 2"),
        ({"tap_positions": "first"}, "last"),
    ):
        response = post(**fields)
        assert response.status_code == 400 and words in response.json()["error"]["message"]


STEER = {"type": "steer", "layer": 0, "vector": [1, 2, 3]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"taps": ["resid.3"]}, "taps", "resid.0 to 2"),
        ({"taps": ["attn_out.2"]}, "taps", "attn_out.0 to 1"),
        ({"taps": ["resid"]}, "taps", "is no tap"),
        ({"taps": ["resid.0"], "stream": True}, "taps", "stream"),
        ({"taps": ["resid.0"], "n": 2}, "taps", "n of 1"),
        ({"taps": ["resid.0"], "prompt": ["a", "b"]}, "taps", "one prompt"),
        ({"taps": ["resid.0"], "use_beam_search": True}, "taps", "use_beam_search"),
        ({"taps": ["resid.0"], "tap_positions": [7]}, "tap_positions", "none of the 7"),
        ({"taps": ["resid.0"], "tap_positions": "first"}, "tap_positions", "last"),
        ({"tap_positions": 3}, "tap_positions", "an array of positions"),
        ({"interventions": [{"type": "shout"}]}, "interventions[0]", "ablate_head"),
        ({"interventions": [STEER | {"layer": 3}]}, "interventions", "0 to 2"),
        ({"interventions": [STEER | {"vector": [1, 2]}]}, "interventions", "has 2 numbers"),
        ({"interventions": [STEER | {"vector": "AAA"}]}, "interventions[0].vector", "base64"),
        ({"interventions": [STEER | {"vector": [1, "a"]}]}, "interventions[0].vector[1]", "number"),
        ({"interventions": [STEER | {"vector": [1, 2, 1e39]}]}, "interventions", "float32"),
        ({"interventions": [STEER] * 9}, "interventions", "8 times at most"),
        (
            {"interventions": [{"type": "ablate_head", "layer": 2, "head": 0}]},
            "interventions",
            "0 to 1",
        ),
        (
            {"interventions": [{"type": "ablate_head", "layer": 1, "head": 2}]},
            "interventions",
            "no head 2",
        ),
        (
            {"interventions": [{"type": "patch", "layer": 1, "position": 7, "vector": [1, 2, 3]}]},
            "interventions",
            "position 7",
        ),
        ({"attention_params": {"rate": "x"}}, "attention_params.rate", "a number or an array"),
        ({"attention_params": {"rate": [1, "x"]}}, "attention_params.rate[1]", "a number"),
    ],
)
def test_refusals(ask: Ask, fields: dict[str, Any], param: str, words: str) -> None:
    response = ask(**fields)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and words in error["message"]


def test_too_much_is_refused(ask: Ask, tapped: FakeClient) -> None:
    tapped.info = msgspec.structs.replace(
        tapped.info, taps=TapShapes(80, 64, hidden_size=8192, vocab_size=128_000)
    )
    wide = FakeClient(tapped.tokenizer, tapped.info)
    http = TestClient(create_app(wide, ServerSettings(served_model_names=("fake",))))
    body = {"model": "fake", "prompt": "x" * 70, "max_tokens": 1, "tap_positions": "all"}
    fits = http.post("/v1/completions", json=body | {"taps": ["resid.0", "resid.1"]})
    assert fits.status_code == 200
    error = http.post("/v1/completions", json=body | {"taps": ["resid.0", "logits.0"]}).json()
    assert error["error"]["code"] == "taps_too_large" and "36.4 MiB" in error["error"]["message"]


def test_an_engine_without_taps_says_so(engine: FakeClient, http: TestClient) -> None:
    for fields in ({"taps": ["resid.0"]}, {"interventions": [STEER]}):
        response = http.post("/v1/completions", json={"model": "fake", "prompt": "a", **fields})
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("taps_not_enabled", *fields)
