"""Masks that the host fills: allowed_token_ids, bad_words and grammars. No JAX.

A mask for the next token needs the tokens before it on the host, so a step with such a row is
dispatched in two halves: the mask is filled while the forward half runs.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from jaxllm.grammar.matcher import GrammarMatcher, fill_masks
from jaxllm.grammar.thoughts import ThoughtGate


def mask_words(vocab_size: int) -> int:
    """int32 words per row; bit v % 32 of word v // 32 stands for token v."""
    return -(-vocab_size // 32)


class RowMask:
    """What one row may draw next, given the tokens it has drawn so far."""

    def __init__(
        self,
        vocab_size: int,
        allowed_token_ids: Sequence[int] | None,
        bad_words: Sequence[Sequence[int]],
        grammar: GrammarMatcher | None = None,
        thoughts: ThoughtGate | None = None,
        *,
        jumps: bool = False,
    ):
        """``thoughts`` has the grammar, if there is one and thoughts may come before it. ``jumps``:
        text without an alternative is spelled in one way, and can be taken at once.
        """
        self._base: np.ndarray | None = None  # what may come at all
        if allowed_token_ids is not None:
            self._base = np.zeros(mask_words(vocab_size), np.int32)
            ids = np.asarray(allowed_token_ids, np.int64)
            np.bitwise_or.at(self._base.view(np.uint32), ids >> 5, _bits(ids))
        self._grammar, self._thoughts = grammar, thoughts
        self._jumps = jumps and allowed_token_ids is None and not bad_words
        self._forced: deque[int] = deque()  # the only tokens that can come next
        self._asked = -1  # position at which they were last looked for
        self.position = 0  # of the token that comes next
        self._bad_words = tuple(tuple(word) for word in bad_words)
        self._longest = max((len(word) for word in self._bad_words), default=1)
        self._tail: list[int] = []  # the last tokens, as many as the longest bad word needs

    def extend(self, token_ids: Sequence[int]) -> None:
        """What is forced depends on where it began, so after a preemption it is looked for all the
        way again.
        """
        if not self._jumps:
            self._take(token_ids)
            return
        for token_id in token_ids:
            self._look_ahead()
            self._take((token_id,))
            if self._forced:
                self._forced.popleft()

    def _take(self, token_ids: Sequence[int]) -> None:
        self.position += len(token_ids)
        if self._bad_words:
            self._tail = [*self._tail, *token_ids][-self._longest :]
        for part in (self._grammar, self._thoughts):
            if part is not None:
                part.extend(token_ids)

    @property
    def grammar(self) -> GrammarMatcher | None:
        """What the next token must follow, beside ``narrow``."""
        self._look_ahead()
        return None if self._forced else self._followed

    @property
    def _followed(self) -> GrammarMatcher | None:
        return self._grammar if self._thoughts is None else self._thoughts.grammar

    def take_forced(self, least: int) -> tuple[int, ...]:
        """Extend by the tokens that alone can come next, if there are so many, and return them."""
        self._look_ahead()
        if len(self._forced) < least:
            return ()
        found = tuple(self._forced)
        self.extend(found)
        return found

    def _look_ahead(self) -> None:
        if not self._jumps or self._forced or self._asked == self.position:
            return
        self._asked = self.position
        given = () if self._thoughts is None else self._thoughts.given
        if not given and (grammar := self._followed) is not None and self._decided:
            given = grammar.forced()
        self._forced.extend(given)

    @property
    def _decided(self) -> bool:
        """Whether the answer is past its thoughts, or has none."""
        return self._thoughts is None or self._thoughts.answering

    @property
    def follows_only(self) -> bool:
        """Whether there is nothing to ``narrow`` in what the grammar allows."""
        no_more = self._thoughts is None and self._base is None and not self._bad_words
        return no_more and not self._forced

    def narrow(self, out: np.ndarray) -> None:
        """Clear in ``out`` (int32 words) what is not among the allowed tokens, or would complete a
        bad word; neither binds what is written for the model at the end of its thoughts. The
        grammar's part is ``row_masks``'.
        """
        self._look_ahead()
        if self._forced:
            out[:] = 0
            words, first = out.view(np.uint32), self._forced[0]
            words[first >> 5] |= _bits(np.asarray(first))
            return
        if self._thoughts is not None and self._thoughts.narrow(out):
            return
        if self._base is not None:
            out &= self._base
        if not self._bad_words:
            return
        words = out.view(np.uint32)
        for *prefix, last in self._bad_words:
            if not prefix or self._tail[-len(prefix) :] == prefix:
                words[last >> 5] &= ~_bits(np.asarray(last))


def row_masks(
    masks: Sequence[tuple[int, RowMask]],
    num_slots: int,
    vocab_size: int,
    begun: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """int32 [slots, words] for a step: slots that are not among ``masks`` may draw anything.
    ``begun``: as ``fill_masks`` has it.
    """
    grammars = [(slot, grammar) for slot, mask in masks if (grammar := mask.grammar) is not None]
    out = np.empty((num_slots, mask_words(vocab_size)), np.int32)
    free = np.ones(num_slots, np.bool_)
    free[[slot for slot, _ in grammars]] = False
    out[free] = -1
    fill_masks(grammars, out, begun)
    for slot, mask in masks:
        if not mask.follows_only:
            mask.narrow(out[slot])
    return out


def _bits(ids: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint32(1), (ids & 31).astype(np.uint32))
