"""Which blocks are on file, and which are being read. Knows hashes and slots, no files.

What is on the disk is for others to find out: they say so (``DiskNews``), and until then nothing
changes here, so decisions follow from the calls alone.
"""

import msgspec

from jaxllm.core.host_tier import HostTier


class DiskNews(msgspec.Struct, frozen=True):
    """What has become of files, by the blocks' hashes, in this order."""

    stored: tuple[bytes, ...] = ()  # whole, and there to be read
    read: tuple[bytes, ...] = ()  # verified, and in the slot asked for
    failed: tuple[bytes, ...] = ()  # could not be read, and will not come: gone, or damaged
    gone: tuple[bytes, ...] = ()  # made way for others; what is being read of them may still come
    off: bool = False  # no file will be written or read any more


class DiskTier:
    """Blocks come from files into slots of the host's memory, and from there like any other."""

    def __init__(self, host: HostTier, *, enabled: bool):
        self.enabled = enabled
        self.num_read = 0
        self._host = host
        self._stored: set[bytes] = set()
        self._reading: dict[bytes, int] = {}  # and the slot it is read into
        self._asked: list[tuple[bytes, int]] = []
        self._most_reading = host.num_slots // 2  # what was saved must have a place, too

    def __contains__(self, block_hash: bytes) -> bool:
        """Whether the block comes when it is asked for, as far as is known."""
        return block_hash in self._stored or block_hash in self._reading

    def reading(self) -> dict[bytes, int]:
        """Slot by hash; a copy, for checks."""
        return self._reading.copy()

    @property
    def num_stored(self) -> int:
        return len(self._stored)

    @property
    def is_reading(self) -> bool:
        return bool(self._reading)

    def wants(self, block_hash: bytes) -> bool:
        """Whether a block that is being saved to the host should get a file as well."""
        return self.enabled and block_hash not in self

    def is_coming(self, block_hash: bytes) -> bool:
        return block_hash in self._reading

    def fetch(self, block_hash: bytes) -> bool:
        """Whether the block is coming: asked for now, if there is a slot for it, or before."""
        if block_hash in self._reading:
            return True
        if block_hash not in self._stored or len(self._reading) >= self._most_reading:
            return False
        slot = self._host.reserve()
        if slot is None:
            return False
        self._reading[block_hash] = slot
        self._asked.append((block_hash, slot))
        return True

    def take_asked(self) -> list[tuple[bytes, int]]:
        """(hash, slot) of what is to be read, since the last call."""
        asked, self._asked = self._asked, []
        return asked

    def hear(self, news: DiskNews) -> None:
        if not self.enabled:
            return
        self._stored.update(news.stored)
        for block_hash in news.read:
            if block_hash in self._reading:
                self._host.arrive(block_hash, self._reading.pop(block_hash))
                self.num_read += 1
        for block_hash in news.failed:
            self._give_up(block_hash)
        self._stored.difference_update(news.failed, news.gone)
        if news.off:
            self.enabled = False
            self._stored.clear()
            for block_hash in tuple(self._reading):
                self._give_up(block_hash)
            self._asked.clear()

    def forget_reads(self) -> None:
        """The host's memory is lost, and all its slots are free again."""
        self._reading.clear()
        self._asked.clear()

    def _give_up(self, block_hash: bytes) -> None:
        slot = self._reading.pop(block_hash, None)
        if slot is not None:
            self._host.release(slot)
