"""Ownership of KV-cache blocks, by number. Knows neither requests nor what a block holds."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

from jaxllm.core.invariant import InvariantError

NULL_BLOCK = 0  # padding points here; nobody owns it, so a stray write harms nobody


class BlockPool:
    """Blocks ``1..num_blocks-1``. Each has owners, or is free.

    A free block whose contents are worth keeping (``keep``) is given out last, the one that has
    been free the longest first. The order is fixed by the calls alone, so a run can be replayed.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 2:
            raise InvariantError(f"A pool needs block 0 and one more, got {num_blocks} blocks.")
        self.num_blocks = num_blocks
        self._owners = [0] * num_blocks
        self._kept = bytearray(num_blocks)  # contents are worth keeping, owned or not
        self._blank = deque(range(1, num_blocks))  # free; first freed, first allocated
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free and kept; oldest first

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._evictable)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that are owned, 0..1."""
        return 1.0 - self.num_free / self.num_usable

    def free_blocks(self) -> Iterator[int]:
        """In the order in which they are given out."""
        yield from self._blank
        yield from self._evictable

    def owners(self) -> list[int]:
        """How many owners each block has, by number; a copy, for checks."""
        return self._owners.copy()

    def num_owners(self, block_id: int) -> int:
        return self._owners[block_id]

    def kept_blocks(self) -> Iterator[int]:
        return (block_id for block_id, kept in enumerate(self._kept) if kept)

    def allocate(self, n: int) -> list[int] | None:
        """Become the owner of ``n`` blocks, or of none at all if fewer are free. What was kept in
        them is lost.
        """
        if n < 0:
            raise InvariantError(f"Cannot allocate {n} blocks.")
        if n > self.num_free:
            return None
        ids = [self._blank.popleft() for _ in range(min(n, len(self._blank)))]
        while len(ids) < n:
            block_id, _ = self._evictable.popitem(last=False)
            self._kept[block_id] = 0
            ids.append(block_id)
        for block_id in ids:
            self._owners[block_id] = 1
        return ids

    def share(self, block_id: int) -> None:
        """Become one more owner of a block with contents.

        Raises:
            InvariantError: it has neither an owner nor contents.
        """
        if not self._owners[block_id]:
            if not self._kept[block_id]:
                raise InvariantError(f"Block {block_id} is shared, but it holds nothing.")
            del self._evictable[block_id]
        self._owners[block_id] += 1

    def free(self, ids: Iterable[int]) -> None:
        """Give up one ownership of each.

        Raises:
            InvariantError: an id is not an owned block (freed twice, or never of this pool).
        """
        for block_id in ids:
            if not 0 < block_id < self.num_blocks:
                raise InvariantError(f"Block {block_id} is not one of 1..{self.num_blocks - 1}.")
            if not self._owners[block_id]:
                raise InvariantError(f"Block {block_id} is freed, but nobody owns it.")
            self._owners[block_id] -= 1
            if self._owners[block_id]:
                continue
            if self._kept[block_id]:
                self._evictable[block_id] = None
            else:
                self._blank.append(block_id)

    def keep(self, block_id: int) -> None:
        """The contents of an owned block are worth keeping from now on."""
        if not self._owners[block_id]:
            raise InvariantError(f"Block {block_id} is kept, but nobody owns it.")
        self._kept[block_id] = 1

    def forget(self, block_id: int) -> None:
        """Its contents are worth nothing any more."""
        self._kept[block_id] = 0
        if block_id in self._evictable:
            del self._evictable[block_id]
            self._blank.append(block_id)
