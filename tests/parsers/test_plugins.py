"""Parsers that other packages bring, found by their entry points."""

from pathlib import Path

import pytest

from jaxllm.errors import ConfigError
from jaxllm.parsers.choice import check_names, choose
from tests.parsers.transcripts import Said, parse

MODULE = """
from jaxllm.parsers.family import CallForm, ToolParser
from jaxllm.parsers.json_calls import json_call
from jaxllm.parsers.reader import Markers

def grammar(r):
    while (yield from r.content_until(Markers("CALL"))):
        with r.attempt():
            yield from r.expect("CALL")
            yield from json_call(r)

LOUD = ToolParser(grammar, CallForm('CALL{"name": "', '", "arguments": ', "}"))
"""
ENTRY_POINTS = """
[jaxllm.tool_parsers]
loud = loud_parser:LOUD
wrong = loud_parser:grammar
[jaxllm.reasoning_parsers]
loud = loud_parser:LOUD
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud_parser.py").write_text(MODULE)
    metadata = tmp_path / "loud_parser-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: loud-parser\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_package_brings_a_parser() -> None:
    parser = choose("loud", "none", None).answer("", {"f": {}})
    assert parser is not None
    said = Said.of(parse(parser, ['Now: CALL{"name": "f", "arguments": {}}']))
    assert said == Said("Now:", "", [{"name": "f", "arguments": "{}"}])


@pytest.mark.parametrize(("tool", "reasoning"), [("wrong", "none"), ("none", "loud")])
def test_what_is_no_parser_is_refused(tool: str, reasoning: str) -> None:
    with pytest.raises(ConfigError, match=r"is no (Tool|Reasoning)Parser"):
        check_names(tool, reasoning)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no tool-call parser 'quiet'; .*hermes.*loud"):
        check_names("quiet", "none")
