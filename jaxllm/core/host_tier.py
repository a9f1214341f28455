"""Which slots of the host's memory hold which blocks. Knows hashes and slots, no contents."""

from collections import OrderedDict, deque


class HostTier:
    """Full blocks that had to leave the device, by hash; the least recently used makes way.

    A step saves before it loads: what it saves it may load again, but a slot that it reads is not
    given to another block before the next step (``step_made``).
    """

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._free = deque(range(num_slots))
        self._read: set[bytes] = set()  # by the step being made

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, block_hash: bytes) -> int | None:
        """A slot to write the block to; None if it is there already, or there is no room."""
        if block_hash in self._slots:
            self._slots.move_to_end(block_hash)
            return None
        if not self._free:
            oldest = next((h for h in self._slots if h not in self._read), None)
            if oldest is None:
                return None
            self._free.append(self._slots.pop(oldest))
        slot = self._slots[block_hash] = self._free.popleft()
        return slot

    def get(self, block_hash: bytes) -> int:
        """The slot of a block that is there, to be read by the step being made."""
        self._slots.move_to_end(block_hash)
        self._read.add(block_hash)
        return self._slots[block_hash]

    def step_made(self) -> None:
        self._read.clear()

    def clear(self) -> None:
        self._free = deque(range(self.num_slots))
        self._slots.clear()
        self._read.clear()
