"""Blocks to files and back, in threads of their own, so that no step waits for a disk.

The engine's thread asks and hears; what it hears of is done and verified. Any trouble with the
directory is said once, and ends the store: the engine goes on without it.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np

from jaxllm.core.disk_tier import DiskNews
from jaxllm.kv_files.block_file import BlockFormat, DamagedBlockError
from jaxllm.kv_files.directory import BlockDirectory

logger = logging.getLogger(__name__)

NUM_READERS = 4
MAX_UNWRITTEN_BYTES = 2**28  # beyond it blocks are not written: a disk may be slower than a device
MAX_SECONDS = 10.0  # that a read may take; a disk that is slower is none
CLOSE_SECONDS = 5.0  # to write what is waiting

Reads = Iterable[tuple[bytes, int]]  # name, slot of the host's memory


class Content(Protocol):
    """A block on its way from a device, or a numpy array."""

    @property
    def nbytes(self) -> int: ...

    def __array__(self) -> Any:
        """Waits for it. RuntimeError: it will never come, since a step failed."""
        ...


class BlockStore:
    """All but ``start`` is for one thread, the engine's."""

    def __init__(
        self,
        directory: BlockDirectory,
        identity: str,
        ending_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """``ending_s``: seconds in which ``ending`` lets blocks be written."""
        self._directory = directory
        self._ending_s = ending_s
        self._ends: float | None = None
        self._identity = identity
        self._clock = clock
        self._tasks: SimpleQueue[tuple[int, bytes, int] | None] = SimpleQueue()
        self._unwritten: SimpleQueue[tuple[bytes, Content] | None] = SimpleQueue()
        self._heard = threading.Condition()  # guards all below
        self._age = 0  # of reads: older ones were forgotten
        self._asked: dict[bytes, float] = {}  # being read, and since when
        self._contents: list[tuple[int, np.ndarray]] = []
        self._stored: list[bytes] = []  # these four are to be told
        self._read: list[bytes] = []
        self._failed: list[bytes] = []
        self._gone: list[bytes] = []
        self._num_unwritten = 0  # bytes
        self._off = self._told_off = False
        self._threads: list[threading.Thread] = []

    def start(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Blocks are arrays of that kind from now on."""
        block_format = BlockFormat(self._directory.key, self._identity, shape, dtype)
        self._stored += self._directory.names()
        for target in (self._read_forever,) * NUM_READERS + (self._write_forever,):
            thread = threading.Thread(target=target, args=(block_format,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def take(self) -> DiskNews | None:
        """What has happened since; None: nothing."""
        with self._heard:
            began = min(self._asked.values(), default=None)
            if not self._off and began is not None and self._clock() - began > MAX_SECONDS:
                self._turn_off(f"a read took more than {MAX_SECONDS:g} s")
            if self._off:
                if self._told_off:
                    return None
                self._told_off = True
                return DiskNews(off=True)
            if not self._has_news():
                return None
            lists = self._stored, self._read, self._failed, self._gone
            stored, read, failed, gone = map(tuple, lists)
            for names in lists:
                names.clear()
            return DiskNews(stored, read, failed, gone)

    def _has_news(self) -> bool:
        return bool(self._stored or self._read or self._failed or self._gone)

    def read(self, reads: Reads) -> None:
        """Fetch blocks, each for a slot; ``take`` tells of each whether it came."""
        with self._heard:
            for name, slot in reads:
                self._asked[name] = self._clock()
                self._tasks.put((self._age, name, slot))

    def wait(self, seconds: float) -> None:
        """Until there is something to hear, but no longer."""
        with self._heard:
            self._heard.wait_for(lambda: self._off or self._has_news(), seconds)

    def write(self, name: bytes, content: Content) -> None:
        """Keep a block, if the disk keeps up."""
        with self._heard:
            late = self._num_unwritten + content.nbytes > MAX_UNWRITTEN_BYTES
            if self._off or (late and self._ends is None):  # ``ending`` has waited
                return
            self._num_unwritten += content.nbytes
        self._unwritten.put((name, content))

    def ending(self) -> bool:
        """As ``engine.block_files`` has it."""
        with self._heard:
            if self._ends is None:
                self._ends = self._clock() + self._ending_s
            left = max(0.0, self._ends - self._clock())
            self._heard.wait_for(
                lambda: self._off or self._num_unwritten <= MAX_UNWRITTEN_BYTES // 2, left
            )
            return not self._off and self._clock() < self._ends

    def contents(self) -> list[tuple[int, np.ndarray]]:
        """(slot, block) of what was read since; they were told of, or will be."""
        with self._heard:
            contents, self._contents = self._contents, []
            return contents

    def forget(self) -> None:
        """Nobody waits for what is being read any more."""
        with self._heard:
            self._age += 1
            self._asked.clear()
            self._contents.clear()
            self._gone += self._failed  # whoever asks for them now asks anew
            self._read.clear()
            self._failed.clear()

    def close(self) -> None:
        """Write what is waiting, if that is soon done, and let go of the directory."""
        for _ in range(NUM_READERS):
            self._tasks.put(None)
        self._unwritten.put(None)
        ends = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        with self._heard:
            self._off = True  # what still waits is not written: the directory may be another's now
        self._directory.close()

    # In the threads --------------------------------------------------------------------------

    def _read_forever(self, block_format: BlockFormat) -> None:
        while (task := self._tasks.get()) is not None:
            age, name, slot = task
            if not self._off and age == self._age:
                self._finish_read(age, name, slot, self._read_one(block_format, name))

    def _read_one(self, block_format: BlockFormat, name: bytes) -> np.ndarray | None:
        try:
            return block_format.unpack(name, self._directory.read(name))
        except DamagedBlockError as damage:
            logger.warning("KV block %s is computed again: %s", name.hex(), damage)
        except FileNotFoundError as error:
            if not self._directory.path.is_dir():
                self._trouble(error)
        except OSError as error:
            logger.warning("KV block %s is computed again: %s", name.hex(), error)
        try:
            self._directory.remove(name)
        except OSError as error:
            self._trouble(error)
        return None

    def _finish_read(self, age: int, name: bytes, slot: int, content: np.ndarray | None) -> None:
        """A slot that nobody waits for any more may have been given to another block: whatever was
        forgotten, or given up when the store ended, must not come.
        """
        with self._heard:
            if age != self._age or self._off:
                self._gone += (name,) * (content is None)
                return
            del self._asked[name]
            if content is None:
                self._failed.append(name)
            else:
                self._read.append(name)
                self._contents.append((slot, content))
            self._heard.notify_all()

    def _write_forever(self, block_format: BlockFormat) -> None:
        while (task := self._unwritten.get()) is not None:
            name, content = task
            gone, stored = (), False
            if not self._off:
                try:
                    pieces = block_format.pack(name, np.asarray(content))
                    gone = self._directory.write(name, pieces)
                    stored = True
                except RuntimeError:
                    logger.warning("KV block %s is not kept: it was lost with a step", name.hex())
                except (OSError, MemoryError) as error:
                    self._trouble(error)
            with self._heard:
                self._num_unwritten -= content.nbytes
                for other in gone:
                    self._tell(other, self._gone, self._stored)
                if stored:
                    self._tell(name, self._stored, self._gone)
                self._heard.notify_all()

    @staticmethod
    def _tell(name: bytes, news: list[bytes], instead: list[bytes]) -> None:
        """The last word on a block is the only one: listeners hear what is there first."""
        if name in instead:
            instead.remove(name)
        news.append(name)

    def _trouble(self, error: OSError | MemoryError) -> None:
        with self._heard:
            self._turn_off(getattr(error, "strerror", None) or str(error) or "no memory")

    def _turn_off(self, reason: str) -> None:
        if not self._off:
            logger.warning(
                "KV blocks are not kept in %s any more: %s", self._directory.path, reason
            )
        self._off = True
        self._heard.notify_all()
