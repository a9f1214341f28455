"""What an answer's text is made of, in the order in which it comes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    index: int
    name: str
    id: str | None = None  # where the model itself names its calls


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A piece of the arguments' JSON text; the pieces of a call, joined, are the whole."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """Also of a call that broke off: its arguments are then no JSON, as a client will see."""

    index: int


Event = Content | Reasoning | ToolCallStart | ToolArguments | ToolCallEnd


def merged(events: Iterable[Event]) -> list[Event]:
    """Neighbours of one kind (and call) as one."""
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        if (
            isinstance(event, Content | Reasoning | ToolArguments)
            and isinstance(last, Content | Reasoning | ToolArguments)
            and replace(last, text="") == replace(event, text="")
        ):
            whole[-1] = replace(last, text=last.text + event.text)
        else:
            whole.append(event)
    return whole
