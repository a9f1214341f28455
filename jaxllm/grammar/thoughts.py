"""Where an answer's thoughts are, what ends them when their budget is used, and when its grammar
begins. A function of the tokens so far, like a matcher: made anew after a preemption.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto

import numpy as np

from jaxllm.grammar.matcher import GrammarMatcher
from jaxllm.messages import Thoughts


class _Phase(Enum):
    OPEN = auto()  # thoughts may come, or may not
    THINKING = auto()
    CLOSING = auto()  # by tokens that are given
    ANSWERING = auto()


class ThoughtGate:
    """What one answer may draw next for the sake of its thoughts.

    Markers are looked for in the text, as the parser of the answer does, so that both agree however
    the model spells them. What is written for it is spelled as the tokenizer does.

    Args:
        bytes_of: a token's bytes; special tokens spelled out.
        grammar: makes the grammar of what follows the thoughts; None if there is none.
        ends: tokens that end an answer, which thoughts before a grammar must not.
    """

    def __init__(
        self,
        thoughts: Thoughts,
        bytes_of: Callable[[int], bytes],
        grammar: Callable[[], GrammarMatcher] | None,
        ends: Sequence[int],
    ):
        self._thoughts = thoughts
        self._opening = thoughts.opening.encode()
        self._closings = tuple(text.encode() for text in thoughts.closings)
        self._bytes_of = bytes_of
        self._make_grammar = grammar
        self._grammar = None if grammar is None else grammar()
        self._ends = tuple(ends)
        self._phase = _Phase.THINKING if thoughts.begun else _Phase.OPEN
        self._pending: list[int] = []  # not looked at yet
        self._begun: list[int] = []  # in phase OPEN
        self._could_answer = True  # in phase OPEN: the grammar has taken all of it
        self._tail = b""  # text that a marker could begin in
        self._num_tokens = 0  # of thoughts
        self._given: tuple[int, ...] = ()
        self._last = -1
        self._close_when_used()

    def extend(self, token_ids: Sequence[int]) -> None:
        self._pending += token_ids

    @property
    def grammar(self) -> GrammarMatcher | None:
        """What the next token must follow, beside ``narrow``."""
        self._advance()
        may_answer = self._phase is _Phase.OPEN and self._could_answer
        return self._grammar if may_answer or self._phase is _Phase.ANSWERING else None

    @property
    def answering(self) -> bool:
        """Whether the thoughts are over, or did not come."""
        self._advance()
        return self._phase is _Phase.ANSWERING

    @property
    def given(self) -> tuple[int, ...]:
        """The tokens that must come next, if these are known."""
        self._advance()
        return self._given if self._phase is _Phase.CLOSING else ()

    def narrow(self, out: np.ndarray) -> bool:
        """Apply what thoughts allow to ``out`` (int32 words), which holds what ``grammar`` does.
        True: nothing else has a say in this token.
        """
        self._advance()
        words, thoughts = out.view(np.uint32), self._thoughts
        if self._phase is _Phase.CLOSING:
            words[:] = 0
            _allow(words, self._given[0])
            return True
        if self._phase is _Phase.OPEN and self._grammar is not None:
            if not self._could_answer:
                words[:] = 0
            place = len(self._begun)
            if thoughts.offered and tuple(self._begun) == thoughts.opening_ids[:place]:
                _allow(words, thoughts.opening_ids[place])
        elif self._phase is _Phase.THINKING and self._grammar is not None:
            _forbid(words, self._ends)
        elif self._phase is _Phase.ANSWERING and self._used and thoughts.again:
            first, *more = thoughts.opening_ids
            if not more or self._last == first:
                _forbid(words, more[:1] or (first,))
        return False

    @property
    def _used(self) -> bool:
        budget = self._thoughts.budget
        return budget is not None and self._num_tokens >= budget

    def _advance(self) -> None:
        pending, self._pending = self._pending, []
        for token_id in pending:
            self._last = token_id
            match self._phase:
                case _Phase.OPEN:
                    self._look_for_opening(token_id)
                case _Phase.THINKING:
                    self._num_tokens += 1
                    self._look_for_closing(self._bytes_of(token_id))
                case _Phase.CLOSING:
                    self._given = self._given[1:]
                    if not self._given:
                        self._phase = _Phase.ANSWERING
                case _Phase.ANSWERING:
                    self._answer(token_id)

    def _look_for_opening(self, token_id: int) -> None:
        self._begun.append(token_id)
        text = b"".join(map(self._bytes_of, self._begun)).lstrip()
        if text.startswith(self._opening):
            if self._make_grammar is not None:
                self._grammar = self._make_grammar()  # whatever it has taken
            self._think(text[len(self._opening) :])
        elif not self._opening.startswith(text):
            self._phase = _Phase.ANSWERING
            if self._grammar is not None:
                self._grammar.extend((token_id,) if self._could_answer else self._begun)
        elif self._grammar is not None and self._could_answer:
            self._could_answer = self._grammar.takes(token_id)
            if self._could_answer:
                self._grammar.extend((token_id,))

    def _think(self, text: bytes) -> None:
        self._phase, self._tail = _Phase.THINKING, b""
        self._look_for_closing(text)

    def _look_for_closing(self, text: bytes) -> None:
        tail = self._tail + text
        found = [(tail.find(closing), closing) for closing in self._closings if closing in tail]
        if not found:
            self._tail = tail[-max(map(len, self._closings)) :]
            self._close_when_used()
            return
        place, closing = min(found)
        rest = tail[place + len(closing) :]
        self._tail, self._phase = b"", _Phase.ANSWERING
        if self._grammar is None:
            return
        if rest.strip():  # of a token that holds more than the marker's end
            self._grammar.fail()
        elif not rest and self._thoughts.after_ids:
            self._give(self._thoughts.after_ids)

    def _close_when_used(self) -> None:
        if self._phase is _Phase.THINKING and self._used:
            self._give(self._thoughts.closing_ids)

    def _give(self, token_ids: tuple[int, ...]) -> None:
        self._phase, self._given = _Phase.CLOSING, token_ids

    def _answer(self, token_id: int) -> None:
        if self._grammar is not None:
            self._grammar.extend((token_id,))
        elif self._thoughts.again:
            tail = self._tail + self._bytes_of(token_id)
            if self._opening in tail:
                self._think(tail.partition(self._opening)[2])
            else:
                self._tail = tail[-len(self._opening) :]


def _allow(words: np.ndarray, token_id: int) -> None:
    words[token_id >> 5] |= np.uint32(1 << (token_id & 31))


def _forbid(words: np.ndarray, token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        words[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
