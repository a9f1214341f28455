"""Golden transcripts of every registered parser, whole and in all pieces."""

import json
import re
from typing import Any

import pytest

from jaxllm.parsers.choice import (
    REASONING_MARKS,
    REASONING_PARSERS,
    TOOL_MARKS,
    TOOL_PARSERS,
    choose,
    marked,
)
from jaxllm.parsers.describe import in_words, written
from jaxllm.parsers.events import ToolArguments, ToolCallStart, merged
from jaxllm.parsers.family import ToolParser
from jaxllm.parsers.machine import AnswerParser, Machine
from tests.parsers.test_histories import PUBLISHED
from tests.parsers.transcripts import TOOLS, Said, cut, golden, parse


def _cases(room: str, names: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name}: {case['name']}")
        for name in names
        for case in golden(room, name)["cases"]
    ]


@pytest.mark.parametrize(("name", "case"), _cases("tool_calls", TOOL_PARSERS.names()))
def test_calls(name: str, case: dict[str, Any]) -> None:
    parser, text = TOOL_PARSERS.load(name), case["text"]
    whole = parse(Machine(parser.grammar, TOOLS), [text])
    said = Said.of(whole)
    assert (said.content, said.calls) == (case["content"], case["calls"])
    assert said.reasoning == case.get("reasoning", "")
    assert _thoughts(AnswerParser([Machine(parser.grammar, TOOLS)], thinks=True), text, 7) == (
        "".join(said.reasoning.split())
    )
    for place in range(1, len(text)):
        assert parse(Machine(parser.grammar, TOOLS), cut(text, [place])) == whole
    assert parse(Machine(parser.grammar, TOOLS), list(text)) == whole


@pytest.mark.parametrize(("name", "case"), _cases("reasoning", REASONING_PARSERS.names()))
def test_reasoning(name: str, case: dict[str, Any]) -> None:
    parsers, prompt = choose("none", name, None), golden("reasoning", name)["prompt"]
    for pieces in ([case["text"]], list(case["text"])):
        parser = parsers.answer(prompt, {})
        assert parser is not None
        said = Said.of(parse(parser, pieces))
        assert said == Said(case["content"], case.get("reasoning", ""))
    thoughts = "".join(said.reasoning.split())
    for size in (1, 5, len(case["text"])):
        parser = parsers.answer(prompt, {})
        assert parser is not None and _thoughts(parser, case["text"], size) == thoughts


def _thoughts(parser: AnswerParser, text: str, size: int) -> str:
    """What stands where the parser says that thoughts do, without blanks; while it is read."""
    for at in range(0, len(text), size):
        may_think, before = parser.may_think, parser.thoughts[-1:]
        parser.feed(text[at : at + size])
        assert may_think or parser.thoughts[-1:] == before
    parser.finish()
    assert not parser.may_think
    return "".join("".join(text[start:end] for start, end in parser.thoughts).split())


def test_calls_follow_thoughts() -> None:
    parser = choose("hermes", "qwen3", None).answer("...<think>\n", TOOLS)
    assert parser is not None
    text = (
        'A <tool_call> {"name": "now"} may do.\n</think>\n\nOne moment.\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    )
    said = Said.of(parse(parser, list(text)))
    assert said.reasoning == 'A <tool_call> {"name": "now"} may do.'
    assert said.content == "One moment."
    assert said.calls == [{"name": "now", "arguments": "{}"}]


@pytest.mark.parametrize(
    ("prompt", "reasoning", "content"),
    [
        ("<think>\n", "a", "b"),
        ("<think>\n\n</think>\n\n", "", "a</think>b"),
        ("", "", "a</think>b"),
    ],
)
def test_the_prompt_may_have_begun_the_thoughts(prompt: str, reasoning: str, content: str) -> None:
    parser = choose("none", "qwen3", None).answer(prompt, {})
    assert parser is not None
    assert Said.of(parse(parser, ["a</think>b"])) == Said(content, reasoning)


def test_arguments_come_while_they_are_written() -> None:
    machine = Machine(TOOL_PARSERS.load("hermes").grammar)
    assert machine.feed('<tool_call>\n{"name": "f", "arg') == []
    start, arguments = merged(machine.feed('uments": {"a": "on'))
    assert start == ToolCallStart(0, "f")
    assert arguments == ToolArguments(0, '{"a": "on')
    assert machine.feed("e, two") == [ToolArguments(0, "e, two")]


# Those of other families are read whole by test_histories.
EXCERPTS = {
    (room, name): text
    for room, table in (("tool_calls", TOOL_PARSERS), ("reasoning", REASONING_PARSERS))
    for name in table.names()
    if (text := golden(room, name).get("template"))
}


@pytest.mark.parametrize(("room", "name"), EXCERPTS)
def test_the_template_tells_the_parser(room: str, name: str) -> None:
    marks = TOOL_MARKS if room == "tool_calls" else REASONING_MARKS
    assert marked(marks, EXCERPTS[room, name]) == name


def test_every_parser_has_a_template() -> None:
    published = {name for *names, _ in PUBLISHED.values() for name in names}
    excerpts = {name for _, name in EXCERPTS}
    # By name only: a template of R1's may leave out <think>, after results of tools for one.
    names = {*TOOL_PARSERS.names(), *REASONING_PARSERS.names()} - {"deepseek_r1"}
    assert names <= published | excerpts


def test_a_template_without_marks_tells_none() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    parsers = choose("auto", "auto", template)
    assert (parsers.tool, parsers.reasoning) == (None, None)
    assert parsers.answer("", TOOLS) is None


@pytest.mark.parametrize(
    "template",
    [
        "{%- set ns_token = ']<]minimax[>[' -%}{{ ns_token ~ '<tool_call>' ~ name }}"
        '{"name": "f", "arguments": {}}',
        "<tool_call>{{ call['arguments'] | items }}<invoke name=",
        "<other:call>\n<function=f>\n<parameter=a>\n1\n</parameter>",
    ],
)
def test_a_family_that_only_looks_like_another_has_no_parser(template: str) -> None:
    assert marked(TOOL_MARKS, template) is None


CALLS = [
    ("search", {"query": 'a "b"\n{c', "options": {"k": [1, None]}, "exact": True, "limit": 3}),
    ("get_weather", {"city": "Paris"}),
    ("now", {}),
]


@pytest.mark.parametrize("name", TOOL_PARSERS.names())
def test_what_is_written_in_the_familys_form_is_read(name: str) -> None:
    parser = TOOL_PARSERS.load(name)
    calls = CALLS[:1] if name == "glm4" else CALLS  # GLM-4 calls one tool at a time
    said = Said.of(parse(Machine(parser.grammar, TOOLS), [written(parser.form, calls)]))
    assert [(c["name"], json.loads(c["arguments"])) for c in said.calls] == calls
    assert said.content == ""


@pytest.mark.parametrize("name", TOOL_PARSERS.names())
def test_a_conversation_in_words_is_read_as_it_was_called(name: str) -> None:
    parser = TOOL_PARSERS.load(name)
    calls = CALLS[:1] if name == "glm4" else CALLS
    called = [{"function": {"name": n, "arguments": a}, "id": "x"} for n, a in calls]
    told = in_words(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": called},
            {"role": "tool", "content": "Rain.", "tool_call_id": "x"},
            {"role": "tool", "content": "Noon.", "tool_call_id": "x"},
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        ],
        parser.form,
    )
    assert [message["role"] for message in told] == ["user", "assistant", "user"]
    assert all("tool_calls" not in message for message in told)
    said = Said.of(parse(Machine(parser.grammar, TOOLS), [told[1]["content"]]))
    assert [(c["name"], json.loads(c["arguments"])) for c in said.calls] == calls
    answers = "The tool answered: Rain.\n\nThe tool answered: Noon.\n\nAnd?"
    assert told[2]["content"] == answers


def test_a_choice_narrows_the_tools() -> None:
    parser = TOOL_PARSERS.load("hermes")
    one = parser.forced(TOOLS, "now", parallel=True)
    assert (set(one.tools), one.parallel) == ({"now"}, False)
    assert parser.forced(TOOLS, None, parallel=True).tools == TOOLS
    with pytest.raises(KeyError):
        parser.forced(TOOLS, "other", parallel=True)


@pytest.mark.parametrize("name", TOOL_PARSERS.names())
def test_ids_are_unique(name: str) -> None:
    parser: ToolParser = TOOL_PARSERS.load(name)
    ids = {parser.new_id() for _ in range(100)}
    assert len(ids) == 100
    pattern = r"[A-Za-z0-9]{9}" if name.startswith("mistral") else r"call_[0-9a-f]{24}"
    assert all(re.fullmatch(pattern, id) for id in ids)
