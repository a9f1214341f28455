"""Calls of tools and thoughts in chat completions, as OpenAI's own client reads them."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from jaxllm.errors import ConfigError
from server.settings import ServerSettings
from tests.parsers.transcripts import GOLDEN
from tests.server.fake_client import FakeClient
from tests.server.sse import events

PATH = "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "now")
]
TWO_CALLS = (
    'Well.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
THOUGHTS = "<think>\nHm, é.\n</think>\n\nYes."

Serve = Callable[..., TestClient]


def says(engine: FakeClient, text: str) -> None:
    engine._answer_ids = engine.tokenizer.encode(text, add_special_tokens=False)


def client_of(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http)


def ask(http: TestClient, **fields: Any) -> dict[str, Any]:
    response = http.post(PATH, json={"model": "fake", "messages": MESSAGES} | fields)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice


def test_calls(serve: Serve, engine: FakeClient) -> None:
    says(engine, TWO_CALLS)
    answer = client_of(serve(tool_call_parser="hermes")).chat.completions.create(
        model="fake", messages=MESSAGES, tools=TOOLS
    )
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Well.")
    calls: Any = choice.message.tool_calls
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("function", "get_weather", '{"city": "Zürich"}'),
        ("function", "now", "{}"),
    ]
    first, second = (call.id for call in calls)
    assert first != second and first.startswith("call_")


def test_calls_alone_have_no_content(serve: Serve, engine: FakeClient) -> None:
    says(engine, TWO_CALLS.removeprefix("Well.\n"))
    message = ask(serve(tool_call_parser="hermes"), tools=TOOLS)["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 2


def test_the_client_puts_a_streamed_call_together(serve: Serve, engine: FakeClient) -> None:
    says(engine, TWO_CALLS)
    client = client_of(serve(tool_call_parser="hermes"))
    with client.chat.completions.stream(model="fake", messages=MESSAGES, tools=TOOLS) as stream:
        for _ in stream:
            pass
        (choice,) = stream.get_final_completion().choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Well.")
    calls = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("get_weather", '{"city": "Zürich"}'),
        ("now", "{}"),
    ]


def test_the_order_of_a_streamed_call(serve: Serve, engine: FakeClient) -> None:
    says(engine, TWO_CALLS)
    body = {"model": "fake", "messages": MESSAGES, "tools": TOOLS, "stream": True}
    chunks, done = events(serve(tool_call_parser="hermes").post(PATH, json=body).text)
    assert done and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    deltas = [c["choices"][0]["delta"] for c in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    starts = [call for call in calls if "id" in call]
    assert [(c["index"], c["function"]["name"], c["function"]["arguments"]) for c in starts] == [
        (0, "get_weather", ""),
        (1, "now", ""),
    ]
    assert all(call.keys() == {"index", "function"} for call in calls if call not in starts)
    pieces = [c["function"]["arguments"] for c in calls if c["index"] == 0][1:]
    assert "".join(pieces) == '{"city": "Zürich"}' and len(pieces) > 10  # as they come


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_when_they_may_not_be_parallel(
    serve: Serve, engine: FakeClient, stream: bool
) -> None:
    says(engine, TWO_CALLS)
    client = client_of(serve(tool_call_parser="hermes"))
    fields: Any = {"model": "fake", "messages": MESSAGES, "tools": TOOLS}
    fields["parallel_tool_calls"] = False
    if stream:
        with client.chat.completions.stream(**fields) as chunks:
            message = chunks.until_done().get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**fields).choices[0].message
    (call,) = message.tool_calls or []
    assert call.function.name == "get_weather"


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"tool_call_parser": "hermes"}, {}),  # no tools
        ({"tool_call_parser": "hermes"}, {"tools": TOOLS, "tool_choice": "none"}),
        ({"tool_call_parser": "none"}, {"tools": TOOLS}),
        ({"tool_call_parser": "hermes", "enable_auto_tool_choice": False}, {"tools": TOOLS}),
        ({}, {"tools": TOOLS}),  # the template tells nothing
    ],
)
def test_text_stays_text(
    serve: Serve, engine: FakeClient, settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    says(engine, TWO_CALLS)
    choice = ask(serve(**settings), **fields)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", TWO_CALLS)
    assert choice["message"].keys() == {"role", "content", "refusal"}


def test_a_call_that_is_cut_off_has_the_limits_reason(serve: Serve, engine: FakeClient) -> None:
    says(engine, TWO_CALLS)
    choice = ask(serve(tool_call_parser="hermes"), tools=TOOLS, max_tokens=65)
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "'


@pytest.mark.parametrize("text", ["Well <tool_c", "Well <tool_call>\n{", "Well.\n"])
def test_what_was_held_to_the_end_is_told(serve: Serve, engine: FakeClient, text: str) -> None:
    says(engine, text)
    http = serve(tool_call_parser="hermes")
    assert ask(http, tools=TOOLS)["message"]["content"] == text
    body = {"model": "fake", "messages": MESSAGES, "tools": TOOLS, "stream": True}
    chunks, _ = events(http.post(PATH, json=body).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == text


def test_logprobs_of_a_stream_are_all_there(serve: Serve, engine: FakeClient) -> None:
    says(engine, TWO_CALLS)
    body = {"model": "fake", "messages": MESSAGES, "tools": TOOLS, "stream": True, "logprobs": True}
    chunks, _ = events(serve(tool_call_parser="hermes").post(PATH, json=body).text)
    scored = [c["choices"][0]["logprobs"] for c in chunks]
    tokens = [entry["token"] for item in scored if item for entry in item["content"]]
    assert len(tokens) == len(TWO_CALLS.encode()) + 1  # and the end


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts(serve: Serve, engine: FakeClient, stream: bool) -> None:
    says(engine, THOUGHTS)
    http = serve(reasoning_parser="qwen3")
    if stream:
        body = {"model": "fake", "messages": MESSAGES, "stream": True}
        chunks, _ = events(http.post(PATH, json=body).text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        names = ("content", "reasoning", "reasoning_content")
        said = {name: "".join(delta.get(name, "") for delta in deltas) for name in names}
    else:
        said = ask(http)["message"]
    assert (said["content"], said["reasoning"]) == ("Yes.", "Hm, é.")
    assert said["reasoning_content"] == said["reasoning"]
    assert "reasoning" not in ask(http, include_reasoning=False)["message"]


HARMONY = (
    "<|channel|>analysis<|message|>Hm, é.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
)


@pytest.mark.parametrize(
    ("parser", "text", "thoughts"),
    [
        ("qwen3", THOUGHTS, "\nHm, é.\n"),
        ("qwen3", "<think>\nHm, é", "\nHm, é"),  # cut off
        ("qwen3", "Yes.", ""),
        ("openai_gptoss", HARMONY, "Hm, é."),
        ("none", THOUGHTS, ""),
    ],
)
def test_tokens_of_thoughts_are_counted(
    serve: Serve, engine: FakeClient, parser: str, text: str, thoughts: str
) -> None:
    """A token is a byte here; é is two, and counts as two."""
    says(engine, text)
    http, want = serve(reasoning_parser=parser), len(thoughts.encode())
    chat: Any = {"model": "fake", "messages": MESSAGES, "max_tokens": len(text.encode())}
    whole = http.post(PATH, json=chat | {"n": 2}).json()["usage"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = chat | {"stream": True, "stream_options": options, "stop": ["never said"]}
    chunks, _ = events(http.post(PATH, json=body).text)
    counts = [chunk["usage"]["completion_tokens_details"]["reasoning_tokens"] for chunk in chunks]
    asked = {"model": "fake", "input": "Hi", "max_output_tokens": chat["max_tokens"]}
    response = http.post("/v1/responses", json=asked).json()["usage"]
    assert whole["completion_tokens_details"] == {"reasoning_tokens": 2 * want}
    assert response["output_tokens_details"] == {"reasoning_tokens": want}
    assert counts == sorted(counts) and (counts[0], counts[-1]) == (0, want)


def with_template(engine: FakeClient, template: str) -> None:
    engine.tokenizer = type(engine.tokenizer)(engine.tokenizer.backend, chat_template=template)


def test_the_template_tells_the_parsers(serve: Serve, engine: FakeClient) -> None:
    template = (GOLDEN / "templates" / "Qwen3-0.6B.jinja").read_text()
    with_template(engine, "{% if false %}" + template + "{% endif %}-")  # of few tokens
    says(engine, THOUGHTS + TWO_CALLS)
    message = ask(serve(), tools=TOOLS)["message"]
    assert (message["reasoning"], message["content"]) == ("Hm, é.", "Yes.Well.")
    assert len(message["tool_calls"]) == 2


def test_the_prompt_decides_where_thoughts_begin(serve: Serve, engine: FakeClient) -> None:
    with_template(
        engine,
        "-{{ '<think>\n\n</think>\n' if enable_thinking is defined and not enable_thinking "
        "else '<think>\n' }}",
    )
    says(engine, "Hm.</think>Yes.")
    http = serve(reasoning_parser="qwen3")
    assert ask(http)["message"]["reasoning"] == "Hm."
    plain = ask(http, chat_template_kwargs={"enable_thinking": False})["message"]
    assert plain["content"] == "Hm.</think>Yes." and "reasoning" not in plain


def test_markers_that_are_special_tokens_are_kept(serve: Serve, engine: FakeClient) -> None:
    http = serve(tool_call_parser="mistral")
    says(engine, '[TOOL_CALLS] [{"name": "now", "arguments": {}}]')
    (call,) = ask(http, tools=TOOLS)["message"]["tool_calls"]
    assert not engine.params[-1].skip_special_tokens
    assert len(call["id"]) == 9
    ask(http)
    assert engine.params[-1].skip_special_tokens


@pytest.mark.parametrize(
    ("template", "flags", "warns"),
    [
        ("{{ tools }}", {}, True),
        ("{{ tools }}", {"tool_call_parser": "hermes"}, False),
        ("{{ tools }}", {"tool_call_parser": "none"}, False),
        ("{{ tools }}<|start|><|channel|>", {}, False),
        ("{{ messages }}", {}, False),
    ],
)
def test_calls_that_nobody_will_read_are_told_of_at_the_start(
    serve: Serve,
    engine: FakeClient,
    caplog: pytest.LogCaptureFixture,
    template: str,
    flags: dict[str, str],
    warns: bool,
) -> None:
    with_template(engine, template)
    serve(**flags)
    assert ("--tool-call-parser" in caplog.text) == warns


def test_calls_and_results_reach_the_template(serve: Serve, engine: FakeClient) -> None:
    with_template(
        engine,
        "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}:{{ m.content }}"
        "{% for c in m.tool_calls %}<{{ c.function.name }}:{{ c.function.arguments.a[0] }}>"
        "{% endfor %};{% endfor %}",
    )
    function = {"name": "f", "arguments": json.dumps({"a": [1]})}
    call = {"id": "c", "type": "function", "function": function}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
    ]
    ask(serve(), messages=messages)
    assert engine.prompts[-1] == "user::Hi;assistant:Hm.:<f:1>;tool::2;"


def test_a_template_may_add_arguments_to_text(serve: Serve, engine: FakeClient) -> None:
    with_template(
        engine,
        "{% for c in messages[1].tool_calls %}{% set a = c.function.arguments %}"
        "{{ '<' + a + '>' }}{{ a | tojson }}{{ a is mapping }}{% endfor %}",
    )
    function = {"name": "f", "arguments": '{"a":1}'}
    message = {"role": "assistant", "tool_calls": [{"function": function}]}
    ask(serve(), messages=[*MESSAGES, message])
    assert engine.prompts[-1] == '<{"a":1}>{"a": 1}True'


def test_arguments_too_deep_to_walk_through_stay_text(serve: Serve, engine: FakeClient) -> None:
    with_template(engine, "{{ messages[1].tool_calls[0].function.arguments is string }}")
    for depth, text in ((64, "False"), (65, "True"), (50_000, "True")):
        function = {"name": "f", "arguments": '{"a":' * depth + "1" + "}" * depth}
        message = {"role": "assistant", "tool_calls": [{"function": function}]}
        ask(serve(), messages=[*MESSAGES, message])
        assert engine.prompts[-1] == text


@pytest.mark.parametrize("field", ["tool_call_parser", "reasoning_parser"])
def test_unknown_names_are_refused_at_the_start(field: str) -> None:
    settings: dict[str, Any] = {field: "nobody"}
    with pytest.raises(ConfigError, match=r"'nobody'; there are .*qwen3.*, auto and none"):
        ServerSettings(**settings)


BUDGETS: dict[str, dict[str, Any]] = {
    PATH: {"messages": MESSAGES, "thinking_token_budget": 4},
    "/v1/responses": {"input": "Hi", "reasoning": {"max_tokens": 4}},
    "/v1/messages": {
        "messages": MESSAGES,
        "max_tokens": 20,
        "thinking": {"type": "enabled", "budget_tokens": 4},
    },
}


@pytest.mark.parametrize("path", BUDGETS)
def test_a_budget_for_thoughts_reaches_the_engine(
    serve: Serve, engine: FakeClient, path: str
) -> None:
    http = serve(reasoning_parser="qwen3")
    assert http.post(path, json={"model": "fake"} | BUDGETS[path]).status_code == 200
    params = engine.params[-1]
    assert params.thinking_token_budget == 4 and params.thoughts is not None
    assert (params.thoughts.opening, params.thoughts.closings) == ("<think>", ("</think>",))


@pytest.mark.parametrize("path", BUDGETS)
def test_a_budget_where_nobody_knows_thoughts(serve: Serve, engine: FakeClient, path: str) -> None:
    """Anthropic's clients cannot ask for thoughts without one."""
    answer = serve(reasoning_parser="none").post(path, json={"model": "fake"} | BUDGETS[path])
    if path == "/v1/messages":
        assert answer.status_code == 200 and engine.params[-1].thinking_token_budget is None
    else:
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "thinking_token_budget")


def test_a_prompt_that_has_ended_the_thoughts_needs_no_budget(
    serve: Serve, engine: FakeClient
) -> None:
    with_template(engine, "<think>\n\n</think>\n\n")
    ask(serve(reasoning_parser="qwen3"), thinking_token_budget=4)
    assert (engine.params[-1].thinking_token_budget, engine.params[-1].thoughts) == (None, None)


def test_a_format_follows_the_thoughts(serve: Serve, engine: FakeClient) -> None:
    http = serve(reasoning_parser="openai_gptoss", tool_call_parser="openai")
    final = "<|start|>assistant<|channel|>final<|message|>"
    for fields, after in (({}, final), ({"tools": TOOLS}, final)):
        ask(http, response_format={"type": "json_object"}, **fields)
        thoughts = engine.params[-1].thoughts
        assert thoughts is not None and thoughts.after == after
    with_template(engine, "{% if tools %}...{% endif %}")
    ask(http, tools=TOOLS, tool_choice="required")
    thoughts = engine.params[-1].thoughts
    assert thoughts is not None and thoughts.after == "<|start|>assistant"
