"""Whether a grammar may go to the engine: found out in processes that may hang, swell and die.

Knows processes and verdicts; the compiling is in ``__main__.py``.
"""

import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import psutil

from jaxllm.errors import InvalidRequestError, RequestFailedError
from jaxllm.grammar.depth import check_depth
from jaxllm.grammar.plain import is_plain
from jaxllm.grammar.structured_outputs import StructuredOutputsParams
from jaxllm.grammar.verdict import CheckerReady, CheckerSetup, Verdict
from jaxllm.ipc import IPCError, SyncChannel

MAX_SECONDS = 0.5  # of CPU time; so much the engine may lose when it compiles the same
KILL_SECONDS = 0.75  # of CPU time, which a busy machine gives slowly
MAX_WAIT_S = 20.0  # for a process that does nothing
_LOOK_EVERY_S = 0.05
MAX_START_S = 60.0  # for a process to read a large vocabulary on a busy machine
MAX_CACHED_BYTES = 4 * 2**20


class GrammarChecker:
    """Compiles grammars once apart, and remembers the verdicts. Safe to share between threads."""

    def __init__(
        self,
        tokenizer_dir: str | None,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ):
        self._setup = CheckerSetup(tokenizer_dir, vocab_size, tuple(eos_token_ids), MAX_SECONDS)
        # A queue of slow ones must not hold up what compiles at once, nor one slow one any other.
        # Each thread has a process of its own, begun when there is work.
        self._plain = ThreadPoolExecutor(1, thread_name_prefix="plain grammars")
        self._others = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        self._mine = threading.local()
        self._processes: set[CheckerProcess] = set()
        self._cache = _VerdictCache(MAX_CACHED_BYTES)
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self._processes)

    def submit(self, spec: StructuredOutputsParams) -> "Future[str]":
        """The grammar in llguidance's form, as soon as it has been seen to compile.

        Raises, in the future:
            InvalidRequestError: it cannot be read, asks for what is not implemented, nothing
                satisfies it, or compiling takes too much time or memory.
            RequestFailedError: there is no process to check it, or it had no time.
        """
        future: Future[str] = Future()
        with self._lock:
            known = self._cache.get(spec)
        try:
            if known is None:
                return self._threads_for(spec).submit(self._check, spec)
            future.set_result(_grammar(spec, known))
        except InvalidRequestError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Kill the processes. What is under way ends with an error."""
        for threads in (self._plain, self._others):
            threads.shutdown(wait=False, cancel_futures=True)
        self._finalizer()

    def _threads_for(self, spec: StructuredOutputsParams) -> ThreadPoolExecutor:
        check_depth(spec)
        return self._plain if is_plain(spec) else self._others

    def _check(self, spec: StructuredOutputsParams) -> str:
        with self._lock:
            verdict = self._cache.get(spec)  # one before it in the queue may have asked the same
        if verdict is None:
            verdict = self._process(spec).judge(spec)
            with self._lock:
                self._cache.add(spec, verdict)
        return _grammar(spec, verdict)

    def _process(self, spec: StructuredOutputsParams) -> "CheckerProcess":
        """This thread's; a new one if the last one died."""
        process: CheckerProcess | None = getattr(self._mine, "process", None)
        if process is not None and process.alive:
            return process
        started = CheckerProcess(self._setup)
        if process is not None:
            process.kill()
            self._processes.discard(process)
        self._processes.add(started)
        self._mine.process = started
        started.wait_until_ready(spec)
        return started


class CheckerProcess:
    """One process and the socket to it. Belongs to one thread; ``kill`` may come from others."""

    def __init__(self, setup: CheckerSetup):
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                (sys.executable, "-m", "jaxllm.grammar", "--fd", str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # else whoever makes it panic could write into our log
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._channel = SyncChannel(self._socket, 0)
        self._channel.send(setup)
        self._killed = False

    @property
    def alive(self) -> bool:
        return not self._killed and self._child.poll() is None

    def wait_until_ready(self, spec: StructuredOutputsParams) -> None:
        """Raises InvalidRequestError (this model knows no grammars) or RequestFailedError."""
        self._socket.settimeout(MAX_START_S)
        try:
            ready: CheckerReady = self._channel.receive(CheckerReady)
        except IPCError:
            self.kill()
            raise RequestFailedError("The process that checks grammars does not start.") from None
        if ready.error is not None:
            self.kill()
            raise spec.invalid(ready.error.rstrip("."))

    def judge(self, spec: StructuredOutputsParams) -> Verdict:
        """No answer in time is one, too: the process is dead then, or killed.

        Raises RequestFailedError: the machine gave it no time, which says nothing of the grammar.
        """
        self._socket.settimeout(MAX_WAIT_S)
        try:
            self._channel.send(spec)
            self._wait_for_answer()
            return self._channel.receive(Verdict)
        except (IPCError, TimeoutError, psutil.Error):
            self.kill()
            reason = f"compiling this {spec.kind} takes too much time or memory"
            return Verdict(error=spec.invalid(reason).message)

    def _wait_for_answer(self) -> None:
        """Raises TimeoutError, RequestFailedError, and psutil.Error where the process is gone."""
        before, deadline = None, time.monotonic() + MAX_WAIT_S
        while not select.select((self._socket,), (), (), _LOOK_EVERY_S)[0]:
            times = psutil.Process(self._child.pid).cpu_times()
            spent = times.user + times.system
            before = spent if before is None else before
            if spent - before > KILL_SECONDS:
                raise TimeoutError
            if time.monotonic() > deadline:
                self.kill()
                raise RequestFailedError(
                    "This machine is too busy to check the grammar. Try again later."
                )

    def kill(self) -> None:
        self._killed = True
        self._child.kill()
        self._child.wait()
        self._socket.close()


def _kill_all(processes: set[CheckerProcess]) -> None:
    while processes:
        processes.pop().kill()


def _grammar(spec: StructuredOutputsParams, verdict: Verdict) -> str:
    if verdict.error is not None:
        raise InvalidRequestError(verdict.error, param=spec.param, code="invalid_grammar")
    return verdict.grammar


class _VerdictCache:
    """The latest verdicts, as many as fit into ``max_bytes``."""

    def __init__(self, max_bytes: int):
        self._verdicts: OrderedDict[object, tuple[Verdict, int]] = OrderedDict()
        self._max_bytes = max_bytes
        self._bytes = 0

    def get(self, spec: StructuredOutputsParams) -> Verdict | None:
        found = self._verdicts.get(key := (spec.param, spec.key()))
        if found is None:
            return None
        self._verdicts.move_to_end(key)
        return found[0]

    def add(self, spec: StructuredOutputsParams, verdict: Verdict) -> None:
        asked = len(str(spec.key()))
        size = 512 + asked + len(verdict.grammar)
        key = (spec.param, spec.key())
        if key in self._verdicts or size > self._max_bytes:
            return
        self._verdicts[key] = verdict, size
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, (_, freed) = self._verdicts.popitem(last=False)
            self._bytes -= freed
