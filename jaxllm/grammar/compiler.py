"""A grammar's text → what its matchers begin from. Knows the model's tokens.

llguidance finds the states of a grammar's lexer when they are first met, and keeps them. Matchers
that share them find them once for all, but behind one lock: only one of them computes at a time.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock, Thread
from weakref import WeakSet

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jaxllm.config.env import cpu_count

logger = logging.getLogger(__name__)

MAX_CACHED = 32
MAX_CACHED_BYTES = 8 * 2**20  # of their text; compiled, typical ones take some ten times as much

# Threads that fill masks: the engine's own waits for them, others have work of theirs.
THREADS = max(1, min(cpu_count() - cpu_count() // 5, 32))
MATCHERS_PER_LANE = 4  # before there is another
MAX_LANES = 2 * THREADS
LANES_S = 0.02  # that all lanes of a grammar but the first may take to compile

# Bounds of what one lane may cost, in memory (a lexer state is about 2 kB) and, by the fuel of a
# step, in time: a mask takes at most some 20 ms. A grammar that hits one of them ends its request.
LIMITS = LLParserLimits(max_lexer_states=10_000, verbose_errors=False)


def compile_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Never raises: ``is_error()`` of what is returned tells."""
    return LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


class Lane:
    """One compilation of a grammar: copies of ``root`` share its lexer. ``users`` have one."""

    def __init__(self, root: LLMatcher):
        self.root = root
        self.users: WeakSet[object] = WeakSet()


class _Lanes:
    """As many of one grammar as its matchers need to compute side by side."""

    def __init__(self, compile_one: Callable[[], LLMatcher]):
        self._compile = compile_one
        began = time.thread_time()
        self._lanes = [Lane(compile_one())]
        seconds = max(time.thread_time() - began, 1e-6)
        self._most = min(MAX_LANES, 1 + int(LANES_S / seconds))

    def least_used(self) -> Lane:
        lane = min(self._lanes, key=lambda lane: len(lane.users))
        if len(lane.users) >= MATCHERS_PER_LANE and len(self._lanes) < self._most:
            lane = Lane(self._compile())
            self._lanes.append(lane)
        return lane


class GrammarCompiler:
    """Compiles grammars that ``GrammarChecker`` has let through, and keeps the latest.

    ``load_tokenizer`` runs at once, in a thread of its own: it takes a second for a large
    vocabulary.
    """

    def __init__(self, load_tokenizer: Callable[[], LLTokenizer]):
        self._tokenizer: Future[LLTokenizer] = Future()
        self._grammars: OrderedDict[str, _Lanes] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()  # a thread may still fill masks of rows that are gone
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

    def lane(self, grammar: str, user: object) -> Lane:
        """A lane for ``user``, which counts as long as it lives."""
        with self._lock:
            lane = self._lanes_of(grammar).least_used()
            lane.users.add(user)
            return lane

    def _lanes_of(self, grammar: str) -> _Lanes:
        lanes = self._grammars.pop(grammar, None)
        if lanes is None:
            self._tokenizer.result()  # not to be taken for the time of compiling
            lanes = _Lanes(lambda: self.compile(grammar))
            self._bytes += len(grammar)
        self._grammars[grammar] = lanes
        while len(self._grammars) > 1 and (
            len(self._grammars) > MAX_CACHED or self._bytes > MAX_CACHED_BYTES
        ):
            self._bytes -= len(self._grammars.popitem(last=False)[0])
        return lanes
