"""One answer's way through its grammar: which tokens may come next. NumPy and llguidance only.

A matcher is a function of its grammar and of the tokens so far: it can be made anew at any time,
after a preemption as after a failed step.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

logger = logging.getLogger(__name__)

MAX_CACHED = 32
MAX_CACHED_BYTES = 8 * 2**20  # of their text; compiled, typical ones take some ten times as much
PARALLEL_FROM = 8  # rows; below it handing them to threads costs more than it gains

# Bounds of what one grammar may cost, in memory (a lexer state is about 2 kB) and, by the fuel of a
# step, in time: a mask takes at most some 20 ms. A grammar that hits one of them ends its request.
LIMITS = LLParserLimits(max_lexer_states=10_000, verbose_errors=False)


def compile_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Never raises: ``is_error()`` of what is returned tells."""
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


class GrammarCompiler:
    """Compiles grammars that ``GrammarChecker`` has let through, and keeps the latest. Knows the
    model's tokens.

    ``load_tokenizer`` runs at once, in a thread of its own: it takes a second for a large
    vocabulary.
    """

    def __init__(self, load_tokenizer: Callable[[], LLTokenizer]):
        self._tokenizer: Future[LLTokenizer] = Future()
        self._roots: OrderedDict[str, LLMatcher] = OrderedDict()
        self._bytes = 0
        Thread(target=self._load, args=(load_tokenizer,), name="grammars", daemon=True).start()

    def _load(self, load_tokenizer: Callable[[], LLTokenizer]) -> None:
        try:
            self._tokenizer.set_result(load_tokenizer())
        except Exception as error:  # kept for whoever needs the tokenizer; most models do without
            self._tokenizer.set_exception(error)

    def bytes_of(self, token_id: int) -> bytes:
        """A token's bytes; special tokens spelled out. Empty where nobody knows."""
        try:
            return self._tokenizer.result().decode_bytes([token_id])
        except Exception:
            logger.exception("Markers in the text cannot be found.")
            return b""

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher that shares nothing."""
        return compile_matcher(self._tokenizer.result(), grammar)

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher that shares the lexer's states with others of its grammar."""
        root = self._roots.pop(grammar, None)
        if root is None:
            root = self.compile(grammar)
            self._bytes += len(grammar)
        self._roots[grammar] = root
        while len(self._roots) > 1 and (
            len(self._roots) > MAX_CACHED or self._bytes > MAX_CACHED_BYTES
        ):
            self._bytes -= len(self._roots.popitem(last=False)[0])
        return root.deep_copy()


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

    def advanced(self) -> LLMatcher | None:
        """The matcher after all tokens; None if it cannot be had."""
        try:
            if self._matcher is None:
                self._matcher = self._compiler.matcher(self._grammar)
            self._matcher.consume_tokens(self._token_ids[self._num_consumed :])
        except Exception:
            logger.exception("A grammar cannot be followed.")
            self._matcher = None
            return None
        self._num_consumed = len(self._token_ids)
        return self._matcher

    def check(self, out: np.ndarray) -> None:
        """After a fill of ``out``. In error, llguidance allows the end: an answer cut anywhere
        would pass for a whole one. Here nothing is allowed then, and the request fails.

        But what failed may be the lexer, which others have filled with their states. So try alone.
        """
        if self._matcher is not None and self._matcher.is_error():
            self._matcher = self._compiler.compile(self._grammar)
            self._matcher.consume_tokens(self._token_ids)
            _fill_one(self._matcher, out)
        if self._failed or self._matcher is None or self._matcher.is_error():
            out[:] = 0


def fill_masks(rows: Sequence[tuple[int, GrammarMatcher]], mask: np.ndarray) -> None:
    """Write the words of each (slot, matcher) into ``mask`` (int32 [slots, words], contiguous): bit
    v % 32 of word v // 32 is set where token v may come next. An end-of-sequence token may where
    the grammar is complete.
    """
    found = [(matcher.advanced(), slot) for slot, matcher in rows]
    ready = [(matcher, slot) for matcher, slot in found if matcher is not None]
    if len(ready) < PARALLEL_FROM:
        for matcher, slot in ready:
            _fill_one(matcher, mask[slot])
    else:
        size = mask.shape[1] * mask.itemsize
        _executor().unsafe_compute_mask_ptr(ready, mask.ctypes.data, size, mask.shape[0])
    for slot, matcher in rows:
        matcher.check(mask[slot])


def _fill_one(matcher: LLMatcher, out: np.ndarray) -> None:
    matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)


_executors: list[LLExecutor] = []


def _executor() -> LLExecutor:
    """One pool of threads for the process, made when it is first needed."""
    if not _executors:
        _executors.append(LLExecutor())
    return _executors[0]
