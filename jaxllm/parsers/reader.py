"""Text that comes in pieces, read as if it were all there.

A grammar is a generator that reads with ``yield from``; it is suspended wherever the text ends for
now. Nothing here looks at where one piece ends and the next begins, so the events are the same
however the text was split. Nothing is read twice: what an attempt had taken when it failed is
content, and reading goes on behind it. So the time is linear in the text, whatever it says.
"""

import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxllm.parsers.events import (
    Content,
    Event,
    Reasoning,
    ToolArguments,
    ToolCallEnd,
    ToolCallStart,
)
from jaxllm.parsers.flow import Flow

type Steps[T] = Generator[None, None, T]  # asks for more text by yielding; returns a T
type Emit = Callable[[str], None]

MAX_HELD = 1 << 16  # characters that may turn out to be a call, or not
_SPACES = re.compile(r"\s+")


class Mismatch(Exception):
    """The text does not go on as the grammar wants."""


class Markers:
    """Literal texts to look for; none may begin with another."""

    def __init__(self, *literals: str):
        self.pattern = re.compile("|".join(map(re.escape, literals)))
        self.beginnings = frozenset(text[:n] for text in literals for n in range(1, len(text)))
        self.longest = max(map(len, literals))


class Reader:
    """Reads for one grammar, and sends its events. ``tools``: declared names, each with the JSON
    schema of its arguments. ``in_reasoning``: the prompt has begun the model's thoughts.
    """

    def __init__(self, tools: Mapping[str, Any], *, in_reasoning: bool = False):
        self.tools = tools
        self.in_reasoning = in_reasoning
        self.events: list[Event] = []
        self.thoughts: list[tuple[int, int]] = []  # where they stand in the text: [start, end)
        self.resting = False  # all that is to come is content
        self.num_calls = 0
        self._content = Flow(Content, self.events)
        self._reasoning = Flow(Reasoning, self.events, strips=True)
        self._text, self._at, self._ended = "", 0, False
        self._position = 0  # of all that was taken
        self._held: list[str] | None = None
        self._num_held = 0
        self._attempting = False
        self._in_call = False
        self._after_mark = False  # of a call or an answer, and nothing but whitespace since

    # What the machine does.

    def add(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    def end(self) -> None:
        self._ended = True

    # Where the text stands. Nothing of it is taken.

    def peek(self) -> Steps[str]:
        """The next character; an empty string at the end of the text."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def sees(self, literal: str) -> Steps[bool]:
        while True:
            there = self._text[self._at : self._at + len(literal)]
            if there == literal:
                return True
            if self._ended or not literal.startswith(there):
                return False
            yield

    # What is read, is taken.

    def accept(self, literal: str) -> Steps[bool]:
        """Take ``literal`` if it is what comes next."""
        if not (yield from self.sees(literal)):
            return False
        self._take(len(literal))
        return True

    def expect(self, literal: str) -> Steps[None]:
        if not (yield from self.accept(literal)):
            raise Mismatch

    def take(self) -> Steps[str]:
        """One character, whatever it is."""
        if not (yield from self.peek()):
            raise Mismatch
        return self._take(1)

    def spaces(self) -> Steps[None]:
        while (yield from self.run(_SPACES)):
            pass

    def run(self, pattern: re.Pattern[str], most: int | None = None) -> Steps[str]:
        """As many characters as are there and match ``pattern``, a repeated class; "": none do.

        A run may be longer than that: ask again until there is none.
        """
        yield from self.peek()
        found = pattern.match(self._text, self._at)
        length = 0 if found is None else found.end() - self._at
        return self._take(length if most is None else min(length, most))

    def word(self, pattern: re.Pattern[str], most: int = 256) -> Steps[str]:
        """A whole run of ``pattern``, of at least one and at most ``most`` characters."""
        word = ""
        while part := (yield from self.run(pattern, most + 1 - len(word))):
            word += part
        if not 0 < len(word) <= most:
            raise Mismatch
        return word

    def until(self, markers: Markers, emit: Emit, most: int | None = None) -> Steps[str]:
        """Emit what comes before the first of ``markers``; that marker, or "" at the end.

        Raises Mismatch, having taken as many, when more than ``most`` characters come before it.
        """
        room = most
        while True:
            end = len(self._text) if room is None else self._at + room + markers.longest
            found = markers.pattern.search(self._text, self._at, end)
            stop = found.start() if found else self._sure_end(markers)
            count = stop - self._at if room is None else min(stop - self._at, room)
            if count:
                emit(self._take(count))
            if self._at < stop:
                raise Mismatch
            if found or self._ended:
                return found[0] if found else ""
            room = None if room is None else room - count
            yield

    def text_until(self, markers: Markers, most: int = MAX_HELD) -> Steps[str]:
        """The text before the first of ``markers``, which must come."""
        pieces: list[str] = []
        if not (yield from self.until(markers, pieces.append, most)):
            raise Mismatch
        return "".join(pieces)

    def _sure_end(self, markers: Markers) -> int:
        """Where a marker could have begun whose rest is still to come."""
        end = len(self._text)
        if not self._ended:
            for start in range(max(self._at, end - markers.longest + 1), end):
                if self._text[start:] in markers.beginnings:
                    return start
        return end

    def _take(self, count: int) -> str:
        too_many = False
        if self._held is not None:
            too_many = self._num_held + count > MAX_HELD
            count = min(count, MAX_HELD - self._num_held)
        taken = self._text[self._at : self._at + count]
        self._at += count
        self._position += count
        if self._held is not None:
            self._held.append(taken)
            self._num_held += count
        if too_many:
            raise Mismatch
        return taken

    # What is sent.

    def content(self, text: str) -> None:
        self._after_mark = self._after_mark and not text.strip()
        self._content.add(text)

    def content_ends(self) -> None:
        """Whitespace around the marker that was just taken only set it apart."""
        self._content.drop_spaces()
        self._after_mark = True

    def rests(self) -> None:
        """All that is to come is content, but for markers."""
        self.resting = True

    def reasoning(self, text: str) -> None:
        """``text``, which is what was just taken."""
        start = self._position - len(text)
        if self.thoughts and self.thoughts[-1][1] == start:
            start = self.thoughts.pop()[0]
        self.thoughts.append((start, self._position))
        self._reasoning.add(text)

    def start_call(self, name: str, id: str | None = None) -> None:
        """What the attempt has taken was a call; its arguments follow as they come."""
        self._content.drop_spaces()
        self._held = None
        self._in_call = True
        self.events.append(ToolCallStart(self.num_calls, name, id))

    def arguments(self, text: str) -> None:
        if text:
            self.events.append(ToolArguments(self.num_calls, text))

    def end_call(self) -> None:
        self.events.append(ToolCallEnd(self.num_calls))
        self.num_calls += 1
        self._in_call, self._after_mark = False, True
        if self._attempting:
            self._hold()

    def call(self, name: str, arguments: str) -> None:
        self.start_call(name)
        self.arguments(arguments)
        self.end_call()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """What is taken in here is no text, unless it turns out to be no call either: then it is
        content after all. A call that breaks off is ended.
        """
        self._attempting = True
        self._hold()
        try:
            yield
        except Mismatch:
            held, self._held = "".join(self._held or ()), None
            if self._in_call:
                self.end_call()
            self.content(held)
        finally:
            self._attempting, self._held = False, None

    def _hold(self) -> None:
        self._held, self._num_held = [], 0

    # What grammars have in common.

    def content_until(self, markers: Markers) -> Steps[str]:
        return (yield from self.until(markers, self.content))

    def closing(self, marker: str) -> Steps[None]:
        """Take ``marker``, and whitespace before it, if they follow a call."""
        if self._after_mark:
            with self.attempt():
                yield from self.spaces()
                yield from self.expect(marker)

    def rest(self) -> Steps[None]:
        """All that is left is content."""
        self.rests()
        while not self._ended or self._at < len(self._text):
            if self._at < len(self._text):
                self.content(self._take(len(self._text) - self._at))
            if not self._ended:
                yield
        if self._after_mark:
            self._content.drop_spaces()
        self._content.end()
