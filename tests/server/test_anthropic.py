"""/v1/messages with Anthropic's own client: whole and streamed, tools, thoughts, errors."""

import json
from collections.abc import Callable
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from starlette.testclient import TestClient

from jaxllm.errors import EngineDeadError
from server.anthropic.answers import AnthropicErrorAnswer
from server.anthropic.answers import Message as OurMessage
from tests.server.fake_client import ANSWER, FakeClient
from tests.server.sse import read_stream
from tests.server.test_tools import THOUGHTS, TWO_CALLS, says, with_template

PATH = "/v1/messages"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
BODY: Any = {"model": "fake", "max_tokens": 200, "messages": MESSAGES}
TOOLS: Any = [{"name": name, "input_schema": {"type": "object"}} for name in ("get_weather", "now")]

Serve = Callable[..., TestClient]


def client_of(http: TestClient, **options: Any) -> anthropic.Anthropic:
    url = "http://testserver"
    options = {"api_key": "none", "max_retries": 0} | options
    return anthropic.Anthropic(base_url=url, http_client=http, **options)


def ask(http: TestClient, **fields: Any) -> dict[str, Any]:
    response = http.post(PATH, json=BODY | fields)
    assert response.status_code == 200, response.text
    OurMessage.model_validate_json(response.content)
    Message.model_validate(response.json())
    return response.json()


def streamed(http: TestClient, **fields: Any) -> list[dict[str, Any]]:
    response = http.post(PATH, json=BODY | fields | {"stream": True})
    assert response.status_code == 200, response.text
    return read_stream(response.text).objects


def test_an_answer(http: TestClient, engine: FakeClient) -> None:
    answer = client_of(http).messages.create(
        model="fake", max_tokens=50, messages=MESSAGES, system="Be brief.", extra_body={"top_k": 3}
    )
    (block,) = answer.content
    assert block.type == "text" and block.text == ANSWER
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.output_tokens == len(ANSWER.encode()) + 1
    assert answer.usage.input_tokens == len(engine.tokenizer.encode(str(engine.prompts[0])))
    assert engine.prompts[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    (params,) = engine.params
    assert (params.max_tokens, params.top_k) == (50, 3)


def test_the_client_puts_a_stream_together(http: TestClient) -> None:
    with client_of(http).messages.stream(model="fake", max_tokens=50, messages=MESSAGES) as stream:
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    assert "".join(pieces) == ANSWER and len(pieces) > 3
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == len(ANSWER.encode()) + 1


def test_the_order_of_a_stream(serve: Serve, engine: FakeClient) -> None:
    says(engine, THOUGHTS + TWO_CALLS)
    http = serve(tool_call_parser="hermes", reasoning_parser="qwen3")
    events = streamed(http, tools=TOOLS)
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    blocks = [event for event in events if event["type"].startswith("content_block")]
    order = [(e["index"], e["type"].removeprefix("content_block_")) for e in blocks]
    wanted = [(i, kind) for i in range(4) for kind in ("start", "delta", "stop")]
    assert list(dict.fromkeys(order)) == [*wanted[:-2], *wanted[-2:]]
    starts = [e["content_block"] for e in blocks if e["type"].endswith("start")]
    assert [block["type"] for block in starts] == ["thinking", "text", "tool_use", "tool_use"]


@pytest.mark.parametrize("stream", [False, True])
def test_tools_and_thoughts(serve: Serve, engine: FakeClient, stream: bool) -> None:
    says(engine, THOUGHTS + TWO_CALLS)
    client = client_of(serve(tool_call_parser="hermes", reasoning_parser="qwen3"))
    fields: Any = {"model": "fake", "max_tokens": 230, "messages": MESSAGES, "tools": TOOLS}
    if stream:
        with client.messages.stream(**fields) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**fields)
    assert message.stop_reason == "tool_use"
    thoughts, text, first, second = message.content
    assert thoughts.type == "thinking" and thoughts.thinking == "Hm, é."
    assert text.type == "text" and text.text == "Yes.Well."
    assert first.type == "tool_use" and (first.name, first.input) == (
        "get_weather",
        {"city": "Zürich"},
    )
    assert second.type == "tool_use" and (second.name, second.input) == ("now", {})
    assert first.id != second.id


def test_one_call_and_no_thoughts(serve: Serve, engine: FakeClient) -> None:
    says(engine, THOUGHTS + TWO_CALLS)
    http = serve(tool_call_parser="hermes", reasoning_parser="qwen3")
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    answer = ask(http, tools=TOOLS, tool_choice=choice, thinking={"type": "disabled"})
    assert [block["type"] for block in answer["content"]] == ["text", "tool_use"]
    answer = ask(http, tools=TOOLS, parallel_tool_calls=False)
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
    answer = ask(http, tools=TOOLS, tool_choice={"type": "none"})
    assert [block["type"] for block in answer["content"]] == ["thinking", "text"]


def test_a_call_that_is_cut_off(serve: Serve, engine: FakeClient) -> None:
    says(engine, TWO_CALLS)
    answer = ask(serve(tool_call_parser="hermes"), tools=TOOLS, max_tokens=65)
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"][1]["input"] == {"arguments": '{"city": "'}


def test_a_stop_sequence(http: TestClient) -> None:
    answer = ask(http, stop_sequences=[", w"])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", ", w")
    assert answer["content"] == [{"type": "text", "text": "Hello"}]
    delta = streamed(http, stop_sequences=[", w"])[-2]
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": ", w"}


def test_the_conversation_reaches_the_template(serve: Serve, engine: FakeClient) -> None:
    with_template(
        engine,
        "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}:{{ m.content }}"
        "{% for c in m.tool_calls %}<{{ c.function.name }} {{ c.function.arguments.a }}>"
        "{% endfor %};{% endfor %}{{ tools[0].function.parameters.type }}{{ enable_thinking }}",
    )
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "c"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": "2"},
                {
                    "type": "tool_result",
                    "tool_use_id": "u",
                    "content": [{"type": "text", "text": "3"}],
                },
                {"type": "text", "text": "d"},
            ],
        },
    ]
    system = [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    ask(serve(), messages=messages, system=system, tools=TOOLS, thinking=thinking, max_tokens=99)
    assert engine.prompts[-1] == (
        "system::s;user::a\nb;assistant:Hm.:c<f 1>;tool::2;tool::3;user::d;objectTrue"
    )


def test_a_system_message_stands_where_it_was_said(http: TestClient, engine: FakeClient) -> None:
    ask(http, messages=[*MESSAGES, {"role": "system", "content": [{"type": "text", "text": "s"}]}])
    assert "Hi<|im_end|>\n<|im_start|>system\ns<|im_end|>" in str(engine.prompts[-1])


def test_the_output_follows_a_schema(serve: Serve, engine: FakeClient) -> None:
    with_template(engine, "{{ messages[0].content }} {{ reasoning_effort }}")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config: Any = {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    client_of(serve()).messages.create(**BODY, output_config=config)
    asked = engine.params[-1].structured_outputs
    assert asked is not None and asked.json == json.dumps(schema)
    assert engine.prompts[-1] == "Hi low"


def test_a_last_message_of_the_assistant_is_continued(http: TestClient, engine: FakeClient) -> None:
    ask(http, messages=[*MESSAGES, {"role": "assistant", "content": "Well,"}])
    assert str(engine.prompts[-1]).endswith("<|im_start|>assistant\nWell,")


def test_a_salt_reaches_the_engine(http: TestClient, engine: FakeClient) -> None:
    ask(http, cache_salt="mine")
    assert engine.cache_salts == ["mine"]


def test_counting_tokens(http: TestClient, engine: FakeClient) -> None:
    counted = client_of(http).messages.count_tokens(model="fake", messages=MESSAGES, system="s")
    ask(http, system="s")
    assert counted.input_tokens == len(engine.tokenizer.encode(str(engine.prompts[-1]), False))


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tool_choice": {"type": "auto"}, "output_config": {"format": {}}}, "output_config"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),  # there are no tools
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
    ],
)
def test_refusals(http: TestClient, fields: dict[str, Any], where: str) -> None:
    response = http.post(PATH, json=BODY | fields)
    assert response.status_code == 400
    answer = AnthropicErrorAnswer.model_validate_json(response.content)
    assert answer.error.type == "invalid_request_error" and where in answer.error.message
    assert response.headers["request-id"] == answer.request_id


def test_errors_are_the_clients_own(serve: Serve, engine: FakeClient) -> None:
    http = serve(api_keys=("secret",))
    with pytest.raises(anthropic.AuthenticationError) as refused:
        client_of(http, api_key="wrong").messages.create(**BODY)
    assert refused.value.body["error"]["type"] == "authentication_error"  # pyright: ignore
    assert client_of(http, api_key="secret").messages.create(**BODY).stop_reason == "end_turn"
    bearer = client_of(http, api_key=None, auth_token="secret")
    assert bearer.messages.create(**BODY).stop_reason == "end_turn"
    with pytest.raises(anthropic.NotFoundError) as missing:
        client_of(http, api_key="secret").messages.create(**BODY | {"model": "other"})
    assert missing.value.body["error"]["type"] == "not_found_error"  # pyright: ignore
    engine.fail_with = EngineDeadError("It died.")
    with pytest.raises(anthropic.APIStatusError) as died:
        client_of(http, api_key="secret").messages.create(**BODY)
    assert died.value.status_code == 503


def test_an_error_in_the_stream_is_its_last_event(http: TestClient, engine: FakeClient) -> None:
    engine.fail_with, engine.fail_at = EngineDeadError("It died."), 3
    *_, last = streamed(http)
    assert last["type"] == "error"
    assert last["error"] == {"type": "api_error", "message": "It died."}
