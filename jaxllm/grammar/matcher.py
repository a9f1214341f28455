"""One answer's way through its grammar: which tokens may come next. NumPy and llguidance only.

A matcher is a function of its grammar and of the tokens so far: it can be made anew at any time,
after a preemption as after a failed step.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher

from jaxllm.grammar.compiler import THREADS, GrammarCompiler, Lane

logger = logging.getLogger(__name__)

PARALLEL_FROM = 8  # rows; below it handing them to threads costs more than it gains


class GrammarMatcher:
    """The state of one row. Compiles when it is first asked, so that this, too, happens while the
    device computes.
    """

    def __init__(self, compiler: GrammarCompiler, grammar: str):
        self._compiler = compiler
        self._grammar = grammar
        self._token_ids: list[int] = []
        self._num_consumed = 0
        self._matcher: LLMatcher | None = None
        self._lane: Lane | None = None
        self._failed = False

    def fail(self) -> None:
        """Something stands in the answer that no grammar has seen: allow nothing more."""
        self._failed = True

    def takes(self, token_id: int) -> bool:
        """Whether the token may come next."""
        matcher = self.advanced()
        return matcher is not None and matcher.validate_tokens([token_id]) == 1

    def forced(self) -> tuple[int, ...]:
        """The tokens that come next whatever is drawn, spelled as the tokenizer spells their text;
        the end of the answer is none of them.
        """
        matcher = self.advanced()
        if matcher is None or self._failed or matcher.is_error():
            return ()
        return tuple(matcher.compute_ff_tokens())

    def extend(self, token_ids: Sequence[int]) -> None:
        self._token_ids += token_ids

    @property
    def lane(self) -> int:
        """The same for matchers of which one at a time can compute; known once it is advanced."""
        return id(self._lane or self)

    def advanced(self) -> LLMatcher | None:
        """The matcher after all tokens; None if it cannot be had."""
        if self._matcher is not None and self._num_consumed == len(self._token_ids):
            return self._matcher
        try:
            if self._matcher is None:
                self._lane = self._compiler.lane(self._grammar, self)
                self._matcher = self._lane.root.deep_copy()
            self._matcher.consume_tokens(self._token_ids[self._num_consumed :])
        except Exception:
            logger.exception("A grammar cannot be followed.")
            self._matcher, self._lane, self._num_consumed = None, None, 0  # anew when asked again
            return None
        self._num_consumed = len(self._token_ids)
        return self._matcher

    @property
    def gave_up(self) -> bool:
        return self._failed or self._matcher is None or self._matcher.is_error()

    def try_alone(self, out: np.ndarray) -> None:
        """After a fill of ``out``, where the matcher ``gave_up``. In error, llguidance allows the
        end: an answer cut anywhere would pass for a whole one. Here nothing is allowed then, and
        the request fails.

        But what failed may be the lexer, which others have filled with their states. So try alone.
        """
        if self._matcher is not None and self._matcher.is_error():
            self._matcher, self._lane = self._compiler.compile(self._grammar), None
            self._matcher.consume_tokens(self._token_ids)
            _fill_one(self._matcher, out)
        if self.gave_up:
            out[:] = 0


def fill_masks(
    rows: Sequence[tuple[int, GrammarMatcher]],
    mask: np.ndarray,
    begun: Callable[[], object] = lambda: None,
) -> None:
    """Write the words of each (slot, matcher) into ``mask`` (int32 [slots, words], contiguous): bit
    v % 32 of word v // 32 is set where token v may come next. An end-of-sequence token may where
    the grammar is complete. ``begun`` is called before the longest part, which leaves Python's lock
    to others.
    """
    found = [(matcher.advanced(), slot, matcher.lane) for slot, matcher in rows]
    found.sort(key=lambda entry: entry[2])  # a thread gets neighbours: those that share a lock
    ready = [(matcher, slot) for matcher, slot, _ in found if matcher is not None]
    begun()
    if len(ready) < PARALLEL_FROM:
        for matcher, slot in ready:
            _fill_one(matcher, mask[slot])
    else:
        size = mask.shape[1] * mask.itemsize
        _executor().unsafe_compute_mask_ptr(ready, mask.ctypes.data, size, mask.shape[0])
    for slot, matcher in rows:
        if matcher.gave_up:
            matcher.try_alone(mask[slot])


def _fill_one(matcher: LLMatcher, out: np.ndarray) -> None:
    matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)


_executors: list[LLExecutor] = []


def _executor() -> LLExecutor:
    """One pool of threads for the process, made when it is first needed."""
    if not _executors:
        _executors.append(LLExecutor(THREADS))
    return _executors[0]
