"""What may go to the engine, why not, and that a process that hangs or dies harms nobody."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jaxllm.errors import InvalidRequestError, RequestFailedError
from jaxllm.grammar.checker import GrammarChecker
from jaxllm.grammar.plain import is_plain
from jaxllm.grammar.structured_outputs import MAX_BYTES, StructuredOutputsParams

SLOW = StructuredOutputsParams(json={"type": "integer", "multipleOf": 99_999_989})


@pytest.fixture
def checker(tiny_tokenizer_dir: Path) -> Iterator[GrammarChecker]:
    checker = GrammarChecker(str(tiny_tokenizer_dir), 258, (257,))
    yield checker
    checker.close()


def refusal(checker: GrammarChecker, **fields: Any) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        checker.submit(StructuredOutputsParams(param="here", **fields)).result()
    assert (caught.value.param, caught.value.code) == ("here", "invalid_grammar")
    assert caught.value.message.startswith("Invalid 'here': ")
    return caught.value.message


def pids(checker: GrammarChecker) -> set[int]:
    return {process._child.pid for process in checker._processes}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"json": {"not": {}}}, "not"),
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"properties": {"a": {"if": {}, "then": {}}}}}, "if"),
    ({"json": {"type": "string", "format": "colour"}}, "colour"),
    ({"json": {"type": "nothing"}}, "nothing"),
    ({"json": {"x-guidance": {"lenient": True}, "not": {}}}, "not"),
    ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "minimum"),
    ({"json": {"$ref": "#"}}, "no text satisfies"),
    ({"json": "false"}, "allows nothing"),
    ({"json": {"enum": [f"{i:010}" for i in range(30_000)] * 2}}, str(MAX_BYTES)),
    ({"json": {"$ref": "https://example.org/schema"}}, "leads out of the schema"),
    ({"json": {"anyOf": [{"$ref": "other.json#/x"}]}}, "leads out of the schema"),
    ({"json": "[" * 1000 + "]" * 1000}, "object"),
    ({"json": '{"a":' * 70 + "1" + "}" * 70}, "64 levels"),
    ({"regex": "("}, "unclosed group"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": "(" * 5000 + ")" * 5000}, "200 levels"),
    ({"grammar": "root ::= (a"}, "grammar cannot be read"),
    ({"grammar": "start: missing"}, "missing"),
    ({"structural_tag": {"structures": []}}, "triggers"),
    ({"structural_tag": {"structures": [], "triggers": []}}, "tags must not be empty"),
    ({"structural_tag": {"structures": [{"begin": "<a>"}], "triggers": ["<b"]}}, "no trigger"),
    ({"json": {}, "whitespace_pattern": "("}, "unclosed group"),
]


@pytest.fixture(scope="module")
def shared(tiny_tokenizer_dir: Path) -> Iterator[GrammarChecker]:
    checker = GrammarChecker(str(tiny_tokenizer_dir), 258, (257,))
    yield checker
    checker.close()


@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=[str(f)[:40] for f, _ in REFUSED])
def test_refused(shared: GrammarChecker, fields: dict[str, Any], reason: str) -> None:
    message = refusal(shared, **fields)
    assert reason in message and len(message) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"json": {}, "regex": "a"}, {"regex": ""}, {"regex": 1}, {"choice": []},
        {"choice": "ab"}, {"choice": [""]}, {"choice": [1]}, {"json": "{"}, {"json": "[]"},
        {"json": {"a": float("nan")}}, {"json": 1}, {"grammar": "\ud800"}, {"json_object": False},
        {"structural_tag": "true"}, {"regex": "a" * (MAX_BYTES + 1)}, {"choice": ["a"] * 10_001},
    ],
    ids=lambda fields: str(fields)[:40],
)  # fmt: skip
def test_refused_before_anything_is_compiled(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        StructuredOutputsParams(**fields)
    assert caught.value.param == "structured_outputs"


def test_references_in_data_and_property_names_are_none(shared: GrammarChecker) -> None:
    schema = {"properties": {"$ref": {"type": "null"}}, "default": {"$ref": "http://x"}}
    assert shared.submit(StructuredOutputsParams(json=schema)).result()


def test_a_process_that_takes_too_long_is_replaced(checker: GrammarChecker) -> None:
    good = StructuredOutputsParams(json_object=True)
    slow, quick = checker.submit(SLOW), checker.submit(good)
    assert quick.result() and not slow.done(), "the slow one held up the other"
    with pytest.raises(InvalidRequestError, match="too much time or memory"):
        slow.result()
    (alive,) = (p for p in checker._processes if p.alive)
    before = pids(checker)
    with pytest.raises(InvalidRequestError, match="too much"):
        checker.submit(SLOW).result(0)  # remembered
    again = [StructuredOutputsParams(choice=[str(i)]) for i in range(4)]
    again += [StructuredOutputsParams(regex=str(i)) for i in range(4)]
    assert all([future.result() for future in [checker.submit(spec) for spec in again]])
    assert alive._child.pid in pids(checker) and pids(checker) != before


def test_a_queue_of_slow_ones_holds_up_nothing_plain(checker: GrammarChecker) -> None:
    multiples = [{"type": "integer", "multipleOf": 99_999_989 - 2 * n} for n in range(6)]
    slow = [checker.submit(StructuredOutputsParams(json=schema)) for schema in multiples]
    person = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 130}}}
    calls = '{"tools": [["f", {"type": "object", "properties": {"s": {"maxLength": 9}}}]]}'
    assert checker.submit(StructuredOutputsParams(json=person)).result()
    assert is_plain(StructuredOutputsParams(calls=calls))
    assert not any(future.done() for future in slow[2:])
    for future in slow:
        future.cancel()


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"multipleOf": 3}}, {"json": {"items": {"pattern": "a*"}}}, {"regex": "a"},
        {"json": {"maxLength": 10_000}}, {"json": {"minimum": 0.1}}, {"json": {"maximum": 2**60}},
        {"json": {"maxItems": 3}}, {"choice": ["a" * 20_000]},
        {"json": {"properties": {"a": {"anyOf": [{"oneOf": []}]}}}}, {"json": {"properties": []}},
        {"json": {"enum": ["b" * 20_000]}}, {"json_object": True, "whitespace_pattern": " "},
        {"calls": '{"tools": [["f", {"not": {}}]]}'}, {"json": {"$defs": {"a": {"format": "x"}}}},
    ],
    ids=lambda fields: str(fields)[:40],
)  # fmt: skip
def test_what_may_take_long_is_not_plain(fields: dict[str, Any]) -> None:
    assert not is_plain(StructuredOutputsParams(**fields))


def test_a_process_that_died_is_replaced(checker: GrammarChecker) -> None:
    assert checker.submit(StructuredOutputsParams(regex="a")).result()
    (process,) = checker._processes
    os.kill(pid := process._child.pid, signal.SIGKILL)
    while process.alive:
        time.sleep(0.01)
    assert checker.submit(StructuredOutputsParams(regex="b")).result()
    assert pid not in pids(checker)


def test_verdicts_are_remembered_and_bounded(
    shared: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = StructuredOutputsParams(regex="once")
    first = shared.submit(spec).result()
    known = shared.submit(StructuredOutputsParams(regex="once"))
    assert known.done() and known.result() == first
    other = StructuredOutputsParams(json={}, disable_any_whitespace=True)
    assert shared.submit(other).result() != shared.submit(StructuredOutputsParams(json={})).result()
    monkeypatch.setattr(shared._cache, "_max_bytes", 10_000)
    for number in range(30):
        shared.submit(StructuredOutputsParams(regex=f"{number}")).result()
    assert shared._cache._bytes <= 10_000
    assert shared._cache._bytes == sum(size for _, size in shared._cache._verdicts.values())


def test_nothing_is_left_running(tiny_tokenizer_dir: Path) -> None:
    checker = GrammarChecker(str(tiny_tokenizer_dir), 258, (257,))
    slow = checker.submit(SLOW)
    while not pids(checker):
        time.sleep(0.01)
    running = pids(checker)
    checker.close()
    assert not any(psutil.pid_exists(pid) for pid in running)
    with pytest.raises((InvalidRequestError, RequestFailedError)):
        slow.result(5)


@pytest.mark.parametrize("eos", [(), (257,)])
def test_a_model_without_the_means(eos: tuple[int, ...]) -> None:
    checker = GrammarChecker(None, 258, eos)
    assert "needs a tokenizer" in refusal(checker, regex="a")
    checker.close()
