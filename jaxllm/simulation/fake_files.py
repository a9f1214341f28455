"""Files of KV blocks without a disk: slow, damaged, gone, full, as the seed has it."""

from collections import OrderedDict
from collections.abc import Iterable
from random import Random

import numpy as np

from jaxllm.core.disk_tier import DiskNews
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.violation import Violation

SLOWEST = 0.2  # seconds that a read takes
DAMAGED = 0.3  # share of reads
LOST_WRITES = 0.1  # share: the disk does not keep up
LATE = 0.1  # share of writes at the end for which there is no time
ENDS = 0.002  # share of writes at which the disk is full or gone


class Disk:
    """What outlives an engine: contents by name, the least recently used first."""

    def __init__(self, most: int):
        self.most = most
        self.files: OrderedDict[bytes, np.ndarray] = OrderedDict()


class FakeFiles:
    """What ``BlockStore`` is to an engine."""

    def __init__(self, disk: Disk, clock: VirtualClock, random: Random):
        self._disk, self._clock, self._random = disk, clock, random
        self._due: list[tuple[float, bytes, int, np.ndarray | None]] = []
        self._contents: list[tuple[int, np.ndarray]] = []
        self._stored = list(disk.files)
        self._failed: list[bytes] = []
        self._gone: list[bytes] = []
        self._off = self._told_off = False
        self.num_read = 0

    def take(self) -> DiskNews | None:
        if self._off:
            told, self._told_off = self._told_off, True
            return None if told else DiskNews(off=True)
        now, read = self._clock.now(), list[bytes]()
        for entry in [entry for entry in self._due if entry[0] <= now]:
            self._due.remove(entry)
            read += self._finish(*entry[1:])
        stored, failed, gone = map(tuple, (self._stored, self._failed, self._gone))
        news = DiskNews(stored, tuple(read), failed, gone)
        for names in (self._stored, self._failed, self._gone):
            names.clear()
        return news if news != DiskNews() else None

    def _finish(self, name: bytes, slot: int, content: np.ndarray | None) -> list[bytes]:
        if content is None or self._random.random() < DAMAGED:
            self._disk.files.pop(name, None)
            self._failed.append(name)
            return []
        self._contents.append((slot, content))
        self.num_read += 1
        return [name]

    def read(self, reads: Iterable[tuple[bytes, int]]) -> None:
        """What is there now may come even if it has made way by then."""
        for name, slot in reads:
            if any(name == other for _, other, _, _ in self._due):
                raise Violation("files", "A block is read twice at once.")
            due = self._clock.now() + self._random.random() * SLOWEST
            self._due.append((due, name, slot, self._disk.files.get(name)))

    def wait(self, seconds: float) -> None:
        ends = self._off and not self._told_off
        if not (self._due or self._stored or self._failed or self._gone or ends):
            raise Violation("files", "The engine waits for what will never come.")
        self._clock.advance(seconds)

    def write(self, name: bytes, content: np.ndarray) -> None:
        self._off |= self._random.random() < ENDS
        if self._off or self._random.random() < LOST_WRITES:
            return
        self._disk.files[name] = content
        self._stored.append(name)
        while len(self._disk.files) > self._disk.most:
            gone, _ = self._disk.files.popitem(last=False)
            self._gone.append(gone)

    def contents(self) -> list[tuple[int, np.ndarray]]:
        contents, self._contents = self._contents, []
        return contents

    def forget(self) -> None:
        self._due.clear()
        self._gone += self._failed
        self._failed.clear()
        self._contents.clear()

    def ending(self) -> bool:
        return not self._off and self._random.random() > LATE

    def close(self) -> None:
        return None
