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
        slot = self.reserve()
        if slot is not None:
            self._slots[block_hash] = slot
        return slot

    def reserve(self) -> int | None:
        """A slot for a block that comes later, or not; None if there is no room."""
        if not self._free:
            oldest = next((h for h in self._slots if h not in self._read), None)
            if oldest is None:
                return None
            self._free.append(self._slots.pop(oldest))
        return self._free.popleft()

    def arrive(self, block_hash: bytes, slot: int) -> None:
        """A reserved slot holds the block now."""
        if block_hash in self._slots:
            self.release(slot)
        else:
            self._slots[block_hash] = slot

    def release(self, slot: int) -> None:
        """A reserved slot is not needed."""
        self._free.append(slot)

    def slots(self) -> list[int]:
        """All but the reserved ones, for checks."""
        return [*self._slots.values(), *self._free]

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
