"""Whatever a model writes: no error, the same events for every split, linear time."""

import json
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.parsers.choice import REASONING_PARSERS, TOOL_PARSERS, choose
from jaxllm.parsers.flow import MAX_SPACES
from jaxllm.parsers.machine import AnswerParser, Machine
from jaxllm.parsers.python_calls import MAX_DEPTH, MAX_PIECES, literal_as_json
from jaxllm.parsers.reader import MAX_HELD
from tests.parsers.transcripts import GOLDEN, TOOLS, Said, cut, golden, parse

PARSERS = [(tool, "none") for tool in TOOL_PARSERS.names()]
PARSERS += [("none", reasoning) for reasoning in REASONING_PARSERS.names()]
PARSERS += [("hermes", "qwen3"), ("deepseek_v31", "deepseek_r1"), ("openai", "openai_gptoss")]
ODD = ["\\", '"', "'", "{", "}", "[", "]", "(", ")", ",", ":", "=", ";", "<", "</", ">", "|", "\n"]
ODD += [
    " ",
    "\t",
    "1",
    "-1.5e3",
    "true",
    "None",
    "\\u",
    "\\ud83d",
    "\\x4",
    "é😀",
    "\0",
    "name",
    "f",
]
ODD += ['{"name": "now", "arguments": {', '"arguments"', '"name": "now"', "now", "now(", "null"]


def answer_parser(tool: str, reasoning: str) -> AnswerParser:
    parser = choose(tool, reasoning, None).answer("", TOOLS)
    assert parser is not None
    return parser


def pieces_of(tool: str, reasoning: str) -> list[str]:
    """Markers of the family, and pieces of its transcripts."""
    found: list[str] = []
    for room, name in (("tool_calls", tool), ("reasoning", reasoning)):
        if (GOLDEN / room / f"{name}.json").exists():
            for case in golden(room, name)["cases"]:
                text = case["text"]
                found += [text, text[: len(text) // 2], text[len(text) // 3 :]]
                found += _tags(text)
    return list(dict.fromkeys(found))


def _tags(text: str) -> Iterator[str]:
    for opening, closing in ("<>", "[]"):
        at = text.find(opening)
        while at >= 0:
            end = text.find(closing, at) + 1
            yield text[at : end or len(text)]
            at = text.find(opening, at + 1)


@pytest.mark.parametrize(("tool", "reasoning"), PARSERS)
def test_every_split_says_the_same(tool: str, reasoning: str) -> None:
    pieces = st.lists(st.sampled_from(pieces_of(tool, reasoning) + ODD), max_size=24)

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(pieces.map("".join), st.lists(st.integers(0, 1 << 20), max_size=8))
    def check(text: str, places: list[int]) -> None:
        whole = parse(answer_parser(tool, reasoning), [text])
        said = Said.of(whole)
        assert parse(answer_parser(tool, reasoning), cut(text, places)) == whole
        assert parse(answer_parser(tool, reasoning), list(text)) == whole
        if reasoning == "none" and tool != "openai" and not said.calls:
            assert said.content == text  # what is no call, is content, all of it
        json.dumps(said.calls).encode()  # no half characters

    check()


def seconds(tool: str, reasoning: str, text: str, size: int) -> float:
    """Of the processor, for a text in pieces of ``size`` characters."""
    parser = answer_parser(tool, reasoning)
    start = time.process_time()
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    parser.finish()
    return time.process_time() - start


def check_doubling(tool: str, reasoning: str, pattern: str, length: int, size: int) -> None:
    """Twice the text takes twice the time, and more where caches overflow; but not four times."""
    text = pattern * (length // len(pattern))
    for _ in range(3):  # others use this machine too
        half = seconds(tool, reasoning, text[: len(text) // 2], size)
        if seconds(tool, reasoning, text, size) <= 3.3 * half + 0.01:
            return
    raise AssertionError(f"not linear in {pattern!r}")


@pytest.mark.parametrize(("tool", "reasoning"), PARSERS)
def test_a_megabyte_of_markers_takes_linear_time(tool: str, reasoning: str) -> None:
    tags = [piece for piece in pieces_of(tool, reasoning) if piece[:1] in "<[" and len(piece) < 25]
    check_doubling(tool, reasoning, (tags or ["[now("])[0], 1 << 20, 1 << 20)


@pytest.mark.parametrize(("tool", "reasoning"), PARSERS)
def test_half_an_answer_over_and_over_takes_linear_time(tool: str, reasoning: str) -> None:
    text = pieces_of(tool, reasoning)[0]
    check_doubling(tool, reasoning, text[: len(text) // 2], 1 << 16, 8)


@pytest.mark.parametrize("opening", ["[{", '"', "\\", " ", '<tool_call>{"a": "', "]", "[now(", "("])
def test_brackets_and_quotes_take_linear_time(opening: str) -> None:
    for tool in ("hermes", "pythonic", "llama3_json"):
        check_doubling(tool, "none", opening, 1 << 18, 1 << 20)
        check_doubling(tool, "none", opening, 1 << 14, 1)


def test_a_long_literal_is_read_up_to_a_bound() -> None:
    assert json.loads(literal_as_json(f"['{'x' * 500_000}', None]"))[1] is None
    assert literal_as_json("[" + "None, " * MAX_PIECES + "]") == ""


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_what_may_be_a_call_is_not_held_for_ever(size: int) -> None:
    text = '<tool_call>{"arguments": {"a": "' + "x" * 2 * MAX_HELD
    machine = Machine(TOOL_PARSERS.load("hermes").grammar)
    sent = 0
    for at in range(0, len(text), size):
        sent += sum(len(event.text) for event in machine.feed(text[at : at + size]))  # pyright: ignore[reportAttributeAccessIssue]
        assert min(at + size, len(text)) - sent <= MAX_HELD + 16
    assert sent == len(text)  # long before the end


def test_whitespace_is_not_held_for_ever() -> None:
    machine = Machine(TOOL_PARSERS.load("hermes").grammar)
    sent = machine.feed(" " * 100_000)
    (event,) = sent
    assert len(event.text) == 100_000 - MAX_SPACES  # pyright: ignore[reportAttributeAccessIssue]
    assert Said.of(sent + machine.finish()).content == " " * 100_000


def test_depth_is_bounded_where_it_is_followed() -> None:
    machine = Machine(TOOL_PARSERS.load("pythonic").grammar, TOOLS)
    said = Said.of(parse(machine, ["[now(a=" + "[" * 100_000]))
    assert said.calls == [{"name": "now", "arguments": '{"a": ' + "[" * (MAX_DEPTH + 1)}]
    assert said.content == "[" * (100_000 - MAX_DEPTH - 1)


def test_deep_json_in_a_bare_value_is_a_string() -> None:
    machine = Machine(TOOL_PARSERS.load("qwen3_coder").grammar, TOOLS)
    deep = "[" * 100_000
    text = f"<tool_call><function=search><parameter=options>{deep}</parameter></function>"
    said = Said.of(parse(machine, [text]))
    assert json.loads(said.calls[0]["arguments"]) == {"options": deep}
