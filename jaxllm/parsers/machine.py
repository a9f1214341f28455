"""Runs grammars over an answer as it comes: text in, events out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.parsers.events import Content, Event
from jaxllm.parsers.reader import Reader, Steps

type Grammar = Callable[[Reader], Steps[None]]


class Machine:
    """One grammar over one text. What the grammar leaves is content."""

    def __init__(
        self,
        grammar: Grammar,
        tools: Mapping[str, Any] | None = None,
        *,
        in_reasoning: bool = False,
    ):
        self._reader = Reader(tools or {}, in_reasoning=in_reasoning)
        self._steps = self._run(grammar)

    def _run(self, grammar: Grammar) -> Steps[None]:
        yield from grammar(self._reader)
        yield from self._reader.rest()

    @property
    def thoughts(self) -> list[tuple[int, int]]:
        """Where thoughts stand in the text so far: [start, end) in characters, of each part."""
        return self._reader.thoughts

    @property
    def resting(self) -> bool:
        """Whether all that is to come is content."""
        return self._reader.resting

    def feed(self, text: str) -> list[Event]:
        if not text:
            return []
        self._reader.add(text)
        next(self._steps)
        return self._taken()

    def finish(self) -> list[Event]:
        """The text has ended. Call it once, and nothing after it."""
        self._reader.end()
        for _ in self._steps:
            raise AssertionError("a grammar waits for text that will never come")
        return self._taken()

    def _taken(self) -> list[Event]:
        events = self._reader.events[:]
        self._reader.events.clear()
        return events


class AnswerParser:
    """Machines one behind the other: each reads the content that the one before it leaves.
    ``thinks``: the first reads thoughts, and no other does.
    """

    def __init__(self, machines: Sequence[Machine], *, thinks: bool):
        self._machines, self._thinks = machines, thinks

    @property
    def thoughts(self) -> list[tuple[int, int]]:
        """As a machine's, of the answer."""
        return self._machines[0].thoughts if self._thinks else []

    @property
    def may_think(self) -> bool:
        """Whether thoughts may still come."""
        return self._thinks and not self._machines[0].resting

    def feed(self, text: str) -> list[Event]:
        return self._pass_on([Content(text)] if text else [], self._machines)

    def finish(self) -> list[Event]:
        events: list[Event] = []
        for position, machine in enumerate(self._machines):
            events += self._pass_on(machine.finish(), self._machines[position + 1 :])
        return events

    def _pass_on(self, events: list[Event], machines: Sequence[Machine]) -> list[Event]:
        for machine in machines:
            passed: list[Event] = []
            for event in events:
                passed += machine.feed(event.text) if isinstance(event, Content) else [event]
            events = passed
        return events
