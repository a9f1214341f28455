"""Whatever the family, the tools and however bad the model: calls follow their tools' schemas."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from jaxllm import LLM, SamplingParams
from jaxllm.errors import InvalidRequestError
from jaxllm.grammar.structured_outputs import StructuredOutputsParams
from jaxllm.parsers.choice import TOOL_PARSERS, Parsers
from jaxllm.parsers.events import Content, Event, ToolArguments, ToolCallStart
from server.tool_choice import ToolChoice
from tests.grammar.rounds import allowed_of
from tests.grammar.schemas import some_document

JSON_FAMILIES = [n for n in TOOL_PARSERS.names() if TOOL_PARSERS.load(n).form.arguments == "json"]
COUNT = 12  # answers for each family
TOOLS: dict[str, Any] = {
    "search": {
        "type": "object",
        "properties": {
            "query": {"type": "string", "maxLength": 8},
            "limit": {"anyOf": [{"type": "integer", "minimum": 3, "maximum": 9}]},
            "exact": {"type": ["boolean", "null"]},
            "area": {"$ref": "#/$defs/area"},
            "unit": {"enum": ["km", 'mile\'s "own"']},
            "note": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
        },
        "required": ["query", "limit"],
        "$defs": {
            "area": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 2}
        },
    },
    "search_all": {"properties": {"q": {"const": "x"}}, "required": ["q"]},
    "now": None,
}


def answers(llm: LLM, params: SamplingParams, count: int = COUNT) -> list[Any]:
    many = [replace(params, seed=seed) for seed in range(count)]
    outputs = llm.generate(["x"] * count, many, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def forced(family: str, choice: ToolChoice, *, parallel: bool = True) -> SamplingParams:
    plain = SamplingParams(temperature=1.0, max_tokens=400)
    return choice.params(plain, Parsers(TOOL_PARSERS.load(family)), parallel=parallel)


def read(parsers: Parsers, tools: dict[str, Any], text: str, rng: random.Random) -> list[Event]:
    """In pieces, as a stream brings it."""
    reader = parsers.answer("", tools)
    assert reader is not None
    events: list[Event] = []
    while text:
        size = rng.randrange(1, 6)
        events += reader.feed(text[:size])
        text = text[size:]
    return events + reader.finish()


def calls_of(events: list[Event]) -> list[tuple[str, Any]]:
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            calls.append((event.name, ""))
        elif isinstance(event, ToolArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return [(name, json.loads(arguments)) for name, arguments in calls]


def check(family: str, tools: dict[str, Any], text: str) -> list[str]:
    """An answer that has ended holds valid calls and nothing else. Their names."""
    events = read(Parsers(TOOL_PARSERS.load(family)), tools, text, random.Random(text))
    assert not any(isinstance(event, Content) for event in events), text
    calls = calls_of(events)
    for name, arguments in calls:
        schema = tools[name] or {"type": "object", "maxProperties": 0}
        Draft202012Validator(schema).validate(arguments)
    return [name for name, _ in calls]


@pytest.mark.parametrize("family", TOOL_PARSERS.names())
def test_required_calls_follow_their_schemas(llm: LLM, family: str) -> None:
    found = answers(llm, forced(family, ToolChoice(TOOLS, required=True)))
    called = [check(family, TOOLS, a.text) for a in found if a.finish_reason == "stop"]
    assert len(called) >= COUNT * 0.7 and all(called)
    assert {name for names in called for name in names} == TOOLS.keys()
    assert (max(map(len, called)) > 1) == (family not in ("glm4",))


@pytest.mark.parametrize("family", TOOL_PARSERS.names())
def test_a_named_tool_is_called_once(llm: LLM, family: str) -> None:
    named = ToolChoice(TOOLS, required=True, named="search")
    for answer in answers(llm, forced(family, named), 4):
        if answer.finish_reason == "stop":
            assert check(family, TOOLS, answer.text) == ["search"]


def test_one_call_if_not_parallel(llm: LLM) -> None:
    params = forced("hermes", ToolChoice(TOOLS, required=True), parallel=False)
    for answer in answers(llm, params):
        assert answer.finish_reason != "stop" or len(check("hermes", TOOLS, answer.text)) == 1


@pytest.mark.parametrize("family", ["hermes", "mistral", "pythonic", "qwen3_coder"])
def test_any_schema_is_followed_or_refused(llm: LLM, family: str) -> None:
    rng = random.Random(0)
    params: list[SamplingParams] = []
    offered: list[dict[str, Any]] = []
    for _ in range(40):
        properties = {f"p{index}": some_document(rng) for index in range(rng.randrange(1, 3))}
        definitions = {key: v for p in properties.values() for key, v in p.pop("$defs", {}).items()}
        schema = {"type": "object", "properties": properties, "$defs": definitions}
        tools = {"f": schema | {"required": ["p0"]}}
        asked = replace(forced(family, ToolChoice(tools, required=True)), seed=len(params))
        try:
            Draft202012Validator.check_schema(schema)
            llm.generate("x", replace(asked, max_tokens=1), use_tqdm=False)
        except InvalidRequestError as error:
            assert family not in JSON_FAMILIES, error
            continue
        params.append(asked)
        offered.append(tools)
    assert len(offered) >= (40 if family in JSON_FAMILIES else 10)
    outputs = llm.generate(["x"] * len(params), params, use_tqdm=False)
    ended = 0
    for tools, output in zip(offered, outputs, strict=True):
        (answer,) = output.outputs
        assert answer.finish_reason in ("stop", "length"), output.error
        if answer.finish_reason == "stop":
            ended += 1
            assert check(family, tools, answer.text)
    assert ended >= len(offered) // 2


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "pattern"),
        ({"properties": {"a": {"type": ["string", "array"]}}}, "tell them"),
        ({"properties": {"a b": {}}}, "'a b'"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "leads nowhere"),
        ({"required": ["a"]}, "'a' needs a schema"),
        ({"properties": {"a": {"enum": ["</parameter>"]}}}, "one of the values"),
    ],
)
def test_what_a_form_cannot_say_is_refused(llm: LLM, schema: Any, reason: str) -> None:
    params = forced("qwen3_coder", ToolChoice({"f": schema}, required=True))
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        llm.generate("x", params, use_tqdm=False)
    assert (caught.value.param, caught.value.code) == ("tools", "invalid_grammar")


def walk(llm: LLM, choice: ToolChoice, text: str) -> str:
    """How much of ``text`` the grammar allows; with "$" behind it if the answer may end there."""
    params = choice.params(SamplingParams(), Parsers(TOOL_PARSERS.load("hermes")), parallel=True)
    spec = params.structured_outputs
    assert isinstance(spec, StructuredOutputsParams)
    return allowed_of(llm, spec, text)


STRICT = ToolChoice({"f": {"properties": {"a": {"type": "integer"}}}, "g": None}, frozenset("f"))
F, G = '<tool_call>\n{"name": "f", "arguments": {"a": 1', '<tool_call>\n{"name": "g", "arguments": '


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("Just text, and <tool", "Just text, and <tool$"),
        (f"Well.\n{F}}}}}\n</tool_call>\n{F}}}}}\n</tool_call> Bye.", "$"),
        (f"{F[:-1]}x", F[:-1]),
        (f'{G}{{"any": []}}}}\n</tool_call>', "$"),
        ("<tool_call>\nx", "<tool_call>\n"),
        ('<tool_call>\n{"name": "h"', '<tool_call>\n{"name": "'),
    ],
)
def test_strict_calls_may_come(llm: LLM, text: str, allowed: str) -> None:
    assert walk(llm, STRICT, text) == (text + "$" if allowed == "$" else allowed)


@pytest.mark.parametrize(("text", "allowed"), [(f"{F}}}}}\n</tool_call>", "$"), ("Hm.", "")])
def test_nothing_stands_before_required_calls(llm: LLM, text: str, allowed: str) -> None:
    choice = replace(STRICT, required=True)
    assert walk(llm, choice, text) == (text + "$" if allowed == "$" else allowed)


def test_without_a_trigger_strict_changes_nothing() -> None:
    params = SamplingParams()
    parsers = Parsers(TOOL_PARSERS.load("llama3_json"))
    assert STRICT.params(params, parsers, parallel=True) is params
    assert STRICT.params(params, Parsers(), parallel=True) is params
