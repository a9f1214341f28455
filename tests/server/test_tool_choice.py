"""What ``tool_choice`` and ``strict`` ask of the engine, and what clients are told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.messages import ModelInfo
from jaxllm.tokenizer.tokenizer import Tokenizer
from tests.server.fake_client import FakeClient
from tests.server.sse import events
from tests.server.test_anthropic import BODY as MESSAGE
from tests.server.test_anthropic import PATH as MESSAGES
from tests.server.test_fields import CHAT, RESPONSES, post
from tests.server.test_tools import client_of, says, with_template

Serve = Callable[..., TestClient]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
CALLED = {"name": "get_weather", "arguments": '{"city": "Bern"}'}


@pytest.fixture
def engine(tokenizer: Tokenizer, tiny_tokenizer_dir: Path) -> FakeClient:
    """With room for tools in words, byte by byte."""
    return FakeClient(tokenizer, ModelInfo("org/fake", str(tiny_tokenizer_dir), 2048, 258, (257,)))


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "f"}])
def test_nothing_said_and_a_call_demanded(serve: Serve, choice: dict[str, Any]) -> None:
    http = serve()
    empty: dict[str, Any] = {"messages": [{"role": "user", "content": []}]}
    empty |= {"tools": [{"name": "f", "input_schema": {}}], "tool_choice": choice}
    response = http.post(MESSAGES, json=MESSAGE | empty)
    assert response.status_code == 400, response.text
    assert "messages" in response.json()["error"]["message"]


def functions(strict: bool | None = None) -> list[dict[str, Any]]:
    more = {} if strict is None else {"strict": strict}
    return [
        {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}
        for name in ("get_weather", "now")
    ]


TOOLS: dict[str, Any] = {
    CHAT: functions(),
    RESPONSES: [{"type": "function"} | tool["function"] for tool in functions()],
    MESSAGES: [{"name": n, "input_schema": SCHEMA} for n in ("get_weather", "now")],
}
REQUIRED: dict[str, Any] = {CHAT: "required", RESPONSES: "required", MESSAGES: {"type": "any"}}
NAMED: dict[str, Any] = {
    CHAT: {"type": "function", "function": {"name": "now"}},
    RESPONSES: {"type": "function", "name": "now"},
    MESSAGES: {"type": "tool", "name": "now"},
}
ALONE: dict[str, Any] = {
    CHAT: {"parallel_tool_calls": False},
    RESPONSES: {"parallel_tool_calls": False},
    MESSAGES: {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
}


def ask(http: TestClient, path: str, **fields: Any) -> Any:
    if path == MESSAGES:
        answer = http.post(path, json=MESSAGE | fields)
    else:
        answer = post(http, path, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def calls_of(engine: FakeClient) -> dict[str, Any]:
    structured = engine.params[-1].structured_outputs
    assert structured is not None and structured.calls is not None
    return json.loads(structured.calls)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_required_calls_reach_the_engine(http: TestClient, engine: FakeClient, path: str) -> None:
    says(engine, CALL)
    answer = ask(http, path, tools=TOOLS[path], tool_choice=REQUIRED[path])
    asked = calls_of(engine)
    assert asked["tools"] == [["get_weather", SCHEMA], ["now", SCHEMA]]
    assert (asked["parallel"], asked["required"]) == (True, True)
    if path == CHAT:
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"] == CALLED
    elif path == RESPONSES:
        (item,) = answer["output"]
        assert (item["type"], item["arguments"]) == ("function_call", CALLED["arguments"])
        assert answer["tool_choice"] == "required"
    else:
        assert answer["stop_reason"] == "tool_use"
        assert answer["content"][0]["input"] == {"city": "Bern"}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_one_tool_by_its_name(http: TestClient, engine: FakeClient, path: str) -> None:
    ask(http, path, tools=TOOLS[path], tool_choice=NAMED[path])
    asked = calls_of(engine)
    assert (asked["tools"], asked["parallel"]) == ([["now", SCHEMA]], False)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_calls_that_are_not_parallel(http: TestClient, engine: FakeClient, path: str) -> None:
    fields = {"tool_choice": REQUIRED[path]} | ALONE[path]
    ask(http, path, tools=TOOLS[path], **fields)
    assert calls_of(engine)["parallel"] is False


def test_a_named_call_ends_as_openais_do(http: TestClient, engine: FakeClient) -> None:
    says(engine, CALL)
    named = {"type": "function", "function": {"name": "get_weather"}}
    (choice,) = ask(http, CHAT, tools=TOOLS[CHAT], tool_choice=named)["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["tool_calls"]


def test_a_required_call_is_streamed(serve: Serve, engine: FakeClient) -> None:
    says(engine, CALL)
    client = client_of(serve())
    fields: Any = {"tools": TOOLS[CHAT], "tool_choice": "required"}
    messages: Any = [{"role": "user", "content": "Hi"}]
    with client.chat.completions.stream(model="fake", messages=messages, **fields) as stream:
        (choice,) = stream.until_done().get_final_completion().choices
    (call,) = choice.message.tool_calls or []
    assert (choice.finish_reason, call.function.arguments) == ("tool_calls", CALLED["arguments"])


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_strict_functions(serve: Serve, engine: FakeClient, path: str) -> None:
    http = serve(tool_call_parser="hermes")
    first, second = TOOLS[path]
    strict = (
        {"function": first["function"] | {"strict": True}} if path == CHAT else {"strict": True}
    )
    ask(http, path, tools=[first | strict, second])
    asked = calls_of(engine)
    assert asked["tools"] == [["get_weather", SCHEMA], ["now", {"type": "object"}]]
    assert asked["required"] is False
    ask(http, path, tools=[first, second])
    assert engine.params[-1].structured_outputs is None


ALLOWED: dict[str, Any] = {
    CHAT: lambda mode: {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [NAMED[CHAT]]},
    },
    RESPONSES: lambda mode: {"type": "allowed_tools", "mode": mode, "tools": [NAMED[RESPONSES]]},
}


@pytest.mark.parametrize("path", ALLOWED)
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools(serve: Serve, engine: FakeClient, path: str, mode: str) -> None:
    """The model is told of all, and calls none but these."""
    http = serve(tool_call_parser="hermes")
    with_template(engine, "{{ tools | length }}")
    ask(http, path, tools=TOOLS[path], tool_choice=ALLOWED[path](mode))
    asked = calls_of(engine)
    assert [name for name, _ in asked["tools"]] == ["now"]
    assert asked["required"] == (mode == "required")
    assert engine.prompts[-1] == "2"


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"mode": "auto", "tools": [{"type": "function", "function": {"name": "x"}}]}, "'x'"),
        ({"mode": "auto", "tools": []}, "say 'none'"),
        ({"mode": "any", "tools": []}, "a mode"),
        ({"mode": "auto", "tools": [{"type": "function"}]}, "a mode"),
        (None, "a mode"),
    ],
)
def test_allowed_tools_that_are_not_there(http: TestClient, choice: Any, reason: str) -> None:
    given = {"type": "allowed_tools", "allowed_tools": choice}
    answer = post(http, CHAT, tools=TOOLS[CHAT], tool_choice=given)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tool_choice")
    assert reason in error["message"]


def test_calls_in_words_where_the_template_has_none_for_them(
    http: TestClient, engine: FakeClient
) -> None:
    with_template(engine, "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    call = {"id": "x", "type": "function", "function": CALLED}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "No.", "tool_call_id": "x"},
    ]
    ask(http, CHAT, messages=messages)
    words = f"[user] Rain?\n[assistant] {CALL}\n[user] The tool answered: No.\n"
    assert engine.prompts[-1] == words
    with_template(engine, "{{ messages[1].tool_calls[0].function.name }} {{ messages[2].role }}")
    ask(http, CHAT, messages=messages)
    assert engine.prompts[-1] == "get_weather tool"


def test_a_template_without_tools_gets_them_in_words(http: TestClient, engine: FakeClient) -> None:
    with_template(engine, "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Hi"}
    for messages in ([user], [system, user]):
        ask(http, CHAT, tools=TOOLS[CHAT], tool_choice="required", messages=messages)
        prompt = str(engine.prompts[-1])
        assert prompt.count("[system]") == 1 and prompt.endswith("[user] Hi\n")
        assert ("Be brief." in prompt) == (system in messages)
        assert json.dumps(TOOLS[CHAT][0]["function"]) in prompt
        assert '<tool_call>\n{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}' in prompt
    ask(http, CHAT, tools=TOOLS[CHAT], messages=[user])
    assert engine.prompts[-1] == "[user] Hi\n"  # nothing asks for calls
    with_template(engine, "{{ tools[0].function.name }}")
    ask(http, CHAT, tools=TOOLS[CHAT], tool_choice="required")
    assert engine.prompts[-1] == "get_weather"


def test_required_calls_and_formats(http: TestClient, engine: FakeClient) -> None:
    """A format is of what is said, and nothing is."""
    json_schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    fields = {"tools": TOOLS[CHAT], "response_format": json_schema}
    ask(http, CHAT, tool_choice="required", **fields)
    assert calls_of(engine)["required"]
    refused = post(http, CHAT, tools=TOOLS[CHAT], tool_choice="required", guided_regex="a").json()[
        "error"
    ]
    assert refused["param"] == "guided_regex" and "tool_choice" in refused["message"]


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"tools": []}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools", "'a b' is not a name"),
        ({"tools": [{"function": {"name": "f", "parameters": 1}}]}, "tools", "an object"),
        ({"ignore_eos": True}, "ignore_eos", "the end"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused(
    http: TestClient, engine: FakeClient, fields: Any, param: str, reason: str, stream: bool
) -> None:
    asked = {"tools": TOOLS[CHAT], "tool_choice": "required", "stream": stream} | fields
    answer = post(http, CHAT, **asked)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert reason in error["message"] and engine.num_running == 0


def test_a_cut_call_has_the_limits_reason(http: TestClient, engine: FakeClient) -> None:
    says(engine, CALL)
    body = {"tools": TOOLS[CHAT], "tool_choice": "required", "max_tokens": 60, "stream": True}
    chunks, done = events(post(http, CHAT, **body).text)
    assert done and chunks[-1]["choices"][0]["finish_reason"] == "length"
