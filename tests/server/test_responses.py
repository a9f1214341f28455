"""POST /v1/responses with OpenAI's own client: whole and streamed, errors, input forms."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from starlette.testclient import TestClient

from jaxllm.errors import EngineDeadError
from tests.server.fake_client import ANSWER, FakeClient
from tests.server.sse import read_stream
from tests.server.test_tools import THOUGHTS, TWO_CALLS, says

PATH = "/v1/responses"
BODY = {"model": "fake", "input": "Hi"}
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(http: TestClient, **fields: Any) -> dict[str, Any]:
    response = http.post(PATH, json=BODY | fields)
    assert response.status_code == 200, response.text
    Response.model_validate(response.json(), strict=True)
    return response.json()


def test_the_client_gets_an_answer(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="fake", input="Hi", instructions="Be brief.", metadata={"a": "b"}, top_p=0.5
    )
    assert answer.output_text == ANSWER
    assert answer.status == "completed"
    assert (answer.metadata, answer.top_p, answer.instructions) == ({"a": "b"}, 0.5, "Be brief.")
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(ANSWER.encode()) + 1
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_the_client_streams(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="fake", input="Hi", stream=True))
    assert list(dict.fromkeys(event.type for event in events)) == ORDER
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWER and len(deltas) > 3
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == ANSWER
    assert last.response.usage is not None
    first = events[0]
    assert first.type == "response.created"
    assert (first.response.status, first.response.output) == ("in_progress", [])
    assert first.response.usage is None
    assert first.response.id == last.response.id


def test_the_clients_own_accumulation_agrees(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake", input="Hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text == ANSWER


def test_a_limit_makes_it_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="fake", input="Hi", max_output_tokens=4)
    assert (answer.status, answer.output_text) == ("incomplete", "Hell")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(model="fake", input="Hi", max_output_tokens=4, stream=True)
    assert last.type == "response.incomplete"
    item = last.response.output[0]
    assert item.type == "message" and item.status == "incomplete"


def test_logprobs(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "fake",
        "input": "Hi",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "max_output_tokens": 3,
    }
    item = client.responses.create(**fields).output[0]
    assert item.type == "message" and item.content[0].type == "output_text"
    whole = item.content[0].logprobs
    assert whole is not None and [entry.token for entry in whole] == ["H", "e", "l"]
    assert len(whole[0].top_logprobs) == 2
    events = client.responses.create(**fields, stream=True)
    parts = [e.logprobs for e in events if e.type == "response.output_text.delta"]
    assert [entry.token for part in parts for entry in part] == ["H", "e", "l"]


def test_an_error_before_the_first_token_has_its_status(
    client: openai.OpenAI, engine: FakeClient
) -> None:
    engine.fail_with = EngineDeadError("It died.")
    with pytest.raises(openai.InternalServerError) as died:
        client.responses.create(model="fake", input="Hi", stream=True)
    assert died.value.status_code == 503


def test_an_error_in_the_stream_is_its_last_event(
    client: openai.OpenAI, engine: FakeClient
) -> None:
    engine.fail_with, engine.fail_at = EngineDeadError("It died."), 3
    events = list(client.responses.create(model="fake", input="Hi", stream=True))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.message) == ("server_error", "It died.")
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_an_error_after_a_ping_is_a_whole_stream(http: TestClient, engine: FakeClient) -> None:
    engine.fail_with, engine.step_seconds = ZeroDivisionError("secret"), 0.3
    http.app.state.serving.settings = type(http.app.state.serving.settings)(  # pyright: ignore[reportAttributeAccessIssue]
        served_model_names=("fake",), ping_interval_s=0.05
    )
    response = http.post(PATH, json=BODY | {"stream": True})
    assert response.status_code == 200
    stream = read_stream(response.content)
    kinds = [item["type"] for item in stream.objects]
    assert kinds == ["response.created", "response.in_progress", "response.failed"]
    assert stream.num_pings > 0
    assert "secret" not in response.text


def test_messages_and_calls_reach_the_template(http: TestClient, engine: FakeClient) -> None:
    answer = ask(http)["output"][0]
    items = [
        {"role": "developer", "content": "Be short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        answer,
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
    ]
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments.a }}>"
        "{% endfor %};{% endfor %}"
    )
    engine.tokenizer = type(engine.tokenizer)(engine.tokenizer.backend, chat_template=source)
    ask(http, input=items, instructions="Yes.")
    assert engine.prompts[-1] == (
        f"system:Yes.;system:Be short.;user:Hi;assistant:{ANSWER}<f 1>;tool:2;"
    )


def test_sampling_parameters_reach_the_engine(http: TestClient, engine: FakeClient) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "min_tokens": 1}
    answer = ask(http, **given, max_output_tokens=5, stop="zz", store=True, user="me")
    (params,) = engine.params
    assert {name: getattr(params, name) for name in given} == given
    assert (params.max_tokens, params.stop, params.logprobs) == (5, ("zz",), None)
    assert (answer["store"], answer["temperature"]) == (False, 0.5)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"tools": [{"type": "web_search", "name": "w"}]}, "tools[0].type", "unsupported_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),  # there are no tools
        ({"tool_choice": "sometimes"}, "tool_choice", "unsupported_value"),
        ({"truncation": "auto"}, "truncation", "invalid_value"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"include": ["file_search_call.results"]}, "include[0]", "invalid_value"),
        ({"input": 1}, "input", "invalid_type"),
        ({"input": []}, "input", "empty_array"),
        ({"input": ["Hi"]}, "input[0]", "invalid_type"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"content": "x"}]}, "input[0].role", "missing_required_parameter"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "unsupported_value"),
        ({"input": [{"type": "function_call"}]}, "input[0].call_id", "missing_required_parameter"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0]",
            "unsupported_content_type",
        ),
        ({"input": "x" * 300}, "input", "context_length_exceeded"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"max_output_tokens": 1000}, "max_output_tokens", "context_length_exceeded"),
        ({"temperature": 200}, "temperature", "decimal_above_max_value"),
        ({"model": "other"}, "model", "model_not_found"),
    ],
)
def test_refusals(http: TestClient, fields: dict[str, Any], param: str, code: str) -> None:
    response = http.post(PATH, json=BODY | fields)
    assert response.status_code == (404 if param == "model" else 400), response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code)


TOOLS: Any = [
    {"type": "function", "name": name, "parameters": {"type": "object"}, "strict": False}
    for name in ("get_weather", "now")
]
SAID = [
    ("reasoning", "Hm, é."),
    ("message", "Yes.Well."),
    ("function_call", '{"city": "Zürich"}'),
    ("function_call", "{}"),
]


def said_by(output: list[Any]) -> list[tuple[str, str]]:
    return [
        (item.type, item.arguments if item.type == "function_call" else item.content[0].text)
        for item in output
    ]


def speaking(serve: Callable[..., TestClient], engine: FakeClient) -> openai.OpenAI:
    says(engine, THOUGHTS + TWO_CALLS)
    http = serve(tool_call_parser="hermes", reasoning_parser="qwen3")
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http)


def test_calls_and_thoughts(serve: Callable[..., TestClient], engine: FakeClient) -> None:
    client = speaking(serve, engine)
    answer = client.responses.create(model="fake", input="Hi", tools=TOOLS)
    assert said_by(answer.output) == SAID
    assert answer.output_text == "Yes.Well."
    calls = [item for item in answer.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["get_weather", "now"]
    assert len({call.call_id for call in calls} | {call.id for call in calls}) == 4
    assert [tool.type for tool in answer.tools] == ["function", "function"]
    one = client.responses.create(model="fake", input="Hi", tools=TOOLS, parallel_tool_calls=False)
    assert said_by(one.output) == SAID[:3]
    none = client.responses.create(model="fake", input="Hi", tools=TOOLS, tool_choice="none")
    assert [item.type for item in none.output] == ["reasoning", "message"]


def test_calls_and_thoughts_are_streamed(
    serve: Callable[..., TestClient], engine: FakeClient
) -> None:
    client = speaking(serve, engine)
    with client.responses.stream(model="fake", input="Hi", tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert said_by(list(final.output)) == SAID
    assert [event.sequence_number for event in events] == list(range(len(events)))
    order = [(getattr(event, "output_index", None), event.type) for event in events]
    kinds = [kind.removeprefix("response.") for _, kind in dict.fromkeys(order)]
    texts = ["content_part.added", "{0}.delta", "{0}.done", "content_part.done"]
    items = [texts, texts, *[["function_call_arguments.delta", "function_call_arguments.done"]] * 2]
    names = ["reasoning_text", "output_text", "", ""]
    assert kinds == [
        "created",
        "in_progress",
        *(
            kind.format(name)
            for name, item in zip(names, items, strict=True)
            for kind in ("output_item.added", *item, "output_item.done")
        ),
        "completed",
    ]
    deltas: Any = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(e.delta for e in deltas if e.output_index == 2) == SAID[2][1]


def test_a_call_that_is_cut_off_is_incomplete(
    serve: Callable[..., TestClient], engine: FakeClient
) -> None:
    says(engine, TWO_CALLS)
    http = serve(tool_call_parser="hermes")
    answer = ask(http, tools=TOOLS, max_output_tokens=65)
    assert answer["status"] == "incomplete"
    assert [item["status"] for item in answer["output"]] == ["completed", "incomplete"]
    assert answer["output"][1]["arguments"] == '{"city": "'


def test_an_answer_without_text_is_an_empty_message(http: TestClient, engine: FakeClient) -> None:
    says(engine, "")
    (item,) = ask(http)["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")
