"""Real clients, unmodified, at work with the default model: whole answers equal streamed ones."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.clients.conftest import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
GIVEN: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}
SIZE = 576  # of its vectors
CITY = {"enum": ["Paris", "London"]}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}


def use(run: Run, program: str, environment: str, url: str) -> dict[str, Any]:
    return run(program, environment, url=f"{url}/v1", **GIVEN)


@pytest.mark.parametrize(
    ("program", "environment"), [("openai_use.py", "openai"), ("openai_use.mjs", "node")]
)
def test_openai(run: Run, default_url: str, program: str, environment: str) -> None:
    told = use(run, program, environment, default_url)
    assert told["models"] == [MODEL, MODEL]
    assert "Paris" in told["chat"]
    assert told["chat"] == told["chat_stream"] == told["chat_accumulated"]
    assert 0 < told["chat_stream_usage"] <= 12
    assert told["completion"].endswith(told["completion_stream"])
    assert told["response"] == told["response_stream"]
    assert told["response"].startswith(told["chat"])
    assert told["embeddings"] == [SIZE, SIZE]
    if environment == "openai":
        assert told["completion"].startswith("Paris is the capital of")
        assert told["chat_usage"] == told["chat_logprobs"] == told["chat_stream_usage"]
        assert told["completion_logprobs"] > 12
        assert told["async"] == [told["chat"]] * 4


def test_ai_sdk(run: Run, default_url: str) -> None:
    properties = {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 3}}
    schema = {"type": "object", "properties": properties, "required": ["city", "days"]}
    told = run("ai_sdk_use.mjs", "node", url=f"{default_url}/v1", schema=schema, **GIVEN)
    assert "Paris" in told["text"] and told["text"] == told["text_stream"]
    assert 0 < told["usage"] == told["usage_stream"] <= 12
    assert told["object"] == told["object_stream"] == told["object_partial"]
    ((name, given),) = told["calls"]
    assert name == "get_weather" and told["calls_stream"] == told["calls"]
    assert told["results"] == [given] and told["reason"] == "tool-calls"
    for found in (told["object"], given):
        Draft202012Validator(schema).validate(found)
        assert found.keys() == properties.keys()


def test_langchain(run: Run, default_url: str) -> None:
    told = use(run, "langchain_use.py", "langchain", default_url)
    assert "Paris" in told["chat"] and told["chat"] == told["chat_stream"]
    assert told["usage"] > 0
    assert told["embeddings"] == [SIZE, SIZE]
    ((name, trip),) = told["calls"]
    assert name == "get_weather" and told["calls_stream"] == told["calls"]
    for given in (trip, told["function_calling"], told["json_schema"]):
        assert given["city"] in ("Paris", "London") and given["days"] in (1, 2, 3)
    assert told["results"] == [f"Sunny in {trip['city']} for {trip['days']} days."]
    assert told["after"]


def test_llama_index(run: Run, default_url: str) -> None:
    told = use(run, "llama_index_use.py", "llama_index", default_url)
    assert "Paris" in told["chat"] and told["chat"] == told["chat_stream"]
    assert told["completion"] and told["completion"] == told["completion_stream"]


def test_litellm(run: Run, default_url: str) -> None:
    told = use(run, "litellm_use.py", "litellm", default_url)
    for provider in ("openai", "hosted_vllm"):
        assert "Paris" in told[f"chat {provider}"]
        assert told[f"chat {provider}"] == told[f"chat_stream {provider}"]
        assert told[f"embeddings {provider}"] == [SIZE, SIZE]


def test_anthropic(run: Run, default_url: str) -> None:
    tools = {
        "get_weather": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
        "add": {"type": "object", "properties": {"a": NUMBER}, "required": ["a"]},
    }
    told = run("anthropic_use.py", "anthropic", url=default_url, tools=tools, **GIVEN)
    assert "Paris" in told["text"] and told["text"] == told["text_stream"]
    assert 0 < told["tokens"] <= 12
    ((name, given),) = told["any"]
    Draft202012Validator(tools[name]).validate(given)
    assert told["any_stream"] == told["any"] and told["any_reason"] == "tool_use"
    for name in tools:
        ((called, given),) = told[f"named {name}"]
        assert called == name
        Draft202012Validator(tools[name]).validate(given)


def test_instructor(run: Run, default_url: str) -> None:
    told = use(run, "instructor_use.py", "instructor", default_url)
    for mode in ("TOOLS", "JSON_SCHEMA"):
        assert told[mode]["name"] in ("Paris", "London", "Rome") and 1 <= told[mode]["rank"] <= 9
    assert told["partial"] == told["TOOLS"]


def test_openai_agents(run: Run, default_url: str) -> None:
    told = use(run, "agents_use.py", "agents", default_url)
    for kind in ("OpenAIChatCompletionsModel", "OpenAIResponsesModel"):
        whole, streamed = told[kind]
        assert whole and whole == streamed
    assert len(told["used"]) >= 4
    for city, days in told["used"]:
        assert city in ("Paris", "London") and days in (1, 2, 3)
