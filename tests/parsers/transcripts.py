"""What models wrote, and what it says: tests/golden/tool_calls and tests/golden/reasoning."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxllm.parsers.events import (
    Content,
    Event,
    Reasoning,
    ToolArguments,
    ToolCallEnd,
    ToolCallStart,
    merged,
)
from jaxllm.parsers.machine import AnswerParser, Machine

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOOLS: dict[str, Any] = json.loads((GOLDEN / "tool_calls" / "tools.json").read_text())


@dataclass
class Said:
    """An answer, put together again from its events, whose order is checked on the way."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Said":
        said, running = cls(), False
        for event in events:
            match event:
                case Content(text):
                    assert text and not running
                    said.content += text
                case Reasoning(text):
                    assert text and not running
                    said.reasoning += text
                case ToolCallStart(index, name):
                    assert index == len(said.calls) and name and not running
                    said.calls.append({"name": name, "arguments": ""})
                    running = True
                case ToolArguments(index, text):
                    assert text and running and index == len(said.calls) - 1
                    said.calls[-1]["arguments"] += text
                case ToolCallEnd(index):
                    assert running and index == len(said.calls) - 1
                    running = False
        assert not running
        return said


def golden(room: str, name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / room / f"{name}.json").read_text())


def parse(parser: AnswerParser | Machine, pieces: Sequence[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merged(events + parser.finish())


def cut(text: str, places: Iterable[int]) -> list[str]:
    bounds = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]
