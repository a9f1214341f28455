"""POST /v1/embeddings: forms of input and output, limits, an engine without them."""

import base64
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import openai
import pytest
from starlette.testclient import TestClient

from jaxllm.errors import EngineDeadError
from server.app import create_app
from server.openai import embeddings
from server.protocol.refusals import RefusalLog
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient
from tests.server.wire import running

PATH = "/v1/embeddings"
SIZE = 4


@pytest.fixture
def embedder(engine: FakeClient) -> FakeClient:
    info = msgspec.structs.replace(engine.info, embedding_size=SIZE)
    return FakeClient(engine.tokenizer, info)


@pytest.fixture
def http(embedder: FakeClient) -> TestClient:
    return TestClient(create_app(embedder, ServerSettings(served_model_names=("fake",))))


def ask(http: TestClient, **fields: Any) -> dict[str, Any]:
    response = http.post(PATH, json={"model": "fake"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("given", "last"),
    [
        ("ab", [98]),
        (["ab", "c"], [98, 99]),
        ([5, 6, 7], [7]),
        ([[5, 6], [7]], [6, 7]),
    ],
)
def test_forms_of_input(http: TestClient, given: object, last: list[int]) -> None:
    answer = ask(http, input=given)
    assert answer["object"] == "list" and answer["model"] == "fake"
    assert [item["index"] for item in answer["data"]] == list(range(len(last)))
    assert [item["embedding"][0] for item in answer["data"]] == [1.0] * len(last)
    assert all(len(item["embedding"]) == SIZE for item in answer["data"])
    assert len({item["embedding"][1] for item in answer["data"]}) == len(set(last))
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0


def test_base64_is_little_endian_float32(http: TestClient) -> None:
    (plain,) = ask(http, input=[3, 200])["data"]
    (packed,) = ask(http, input=[3, 200], encoding_format="base64")["data"]
    numbers = struct.unpack(f"<{SIZE}f", base64.b64decode(packed["embedding"]))
    assert list(numbers) == plain["embedding"] == [1.0, 200.0, 0.0, 0.0]


def test_the_client_reads_them(embedder: FakeClient) -> None:
    app = create_app(embedder, ServerSettings(served_model_names=("fake",)))
    with running(app, refusals=RefusalLog()) as port:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            for form in (openai.omit, "float", "base64"):
                answer = client.embeddings.create(
                    model="fake", input=[[1, 2], [3]], encoding_format=form
                )
                assert [item.index for item in answer.data] == [0, 1]
            assert client.embeddings.create(model="fake", input=[1, 2]).data[0].embedding == [
                1.0,
                2.0,
                0.0,
                0.0,
            ]
            with pytest.raises(openai.BadRequestError) as bad:
                client.embeddings.create(model="fake", input="a", dimensions=2)
            assert bad.value.param == "dimensions"


def test_many_inputs(http: TestClient, embedder: FakeClient) -> None:
    answer = ask(http, input=["a"] * 1000)
    assert len(answer["data"]) == 1000
    assert embedder.num_running == 0


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": ""}, "input", "empty_prompt"),
        ({"input": []}, "input", "empty_array"),
        ({"input": ["a", ""]}, "input", "empty_prompt"),
        ({"input": ["a", 1]}, "input[1]", "invalid_type"),
        ({"input": [9999]}, "input", "invalid_value"),
        ({"input": "x" * 300}, "input", "context_length_exceeded"),
        ({"input": ["x"] * 2049}, "input", "array_above_max_length"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value"),
        ({"input": "a", "dimensions": 2}, "dimensions", "unsupported_parameter"),
    ],
)
def test_refusals(http: TestClient, fields: dict[str, Any], param: str, code: str) -> None:
    response = http.post(PATH, json={"model": "fake"} | fields)
    assert response.status_code == 400, response.text
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)


def test_answers_are_bounded(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MAX_NUMBERS", 3 * SIZE)
    assert len(ask(http, input=["a"] * 3)["data"]) == 3
    response = http.post(PATH, json={"model": "fake", "input": ["a"] * 4})
    assert response.json()["error"]["code"] == "array_above_max_length"


def test_an_engine_without_them_says_so(serve: Callable[..., TestClient]) -> None:
    response = serve().post(PATH, json={"model": "fake", "input": "a"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "embeddings_not_enabled"
    assert "--enable-embeddings" in error["message"]


def test_a_dead_engine(http: TestClient, embedder: FakeClient) -> None:
    embedder.fail_with = EngineDeadError("It died.")
    response = http.post(PATH, json={"model": "fake", "input": ["a", "b"]})
    assert response.status_code == 503
    assert embedder.num_running == 0
