"""Ownership of KV-cache blocks, by number. Knows neither requests nor what a block holds."""

from collections import deque
from collections.abc import Iterable, Iterator

from jaxllm.core.invariant import InvariantError

NULL_BLOCK = 0  # padding points here; nobody owns it, so a stray write harms nobody


class BlockPool:
    """Blocks ``1..num_blocks-1``, each free or owned once.

    The order is fixed by the calls alone (first freed, first allocated), so a run can be replayed.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 2:
            raise InvariantError(f"A pool needs block 0 and one more, got {num_blocks} blocks.")
        self.num_blocks = num_blocks
        self._free = deque(range(1, num_blocks))
        self._owned = bytearray(num_blocks)

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that are owned, 0..1."""
        return 1.0 - len(self._free) / self.num_usable

    def free_blocks(self) -> Iterator[int]:
        return iter(self._free)

    def allocate(self, n: int) -> list[int] | None:
        """Take ``n`` blocks, or none at all if fewer are free."""
        if n < 0:
            raise InvariantError(f"Cannot allocate {n} blocks.")
        if n > len(self._free):
            return None
        ids = [self._free.popleft() for _ in range(n)]
        for block_id in ids:
            self._owned[block_id] = 1
        return ids

    def free(self, ids: Iterable[int]) -> None:
        """Give blocks back.

        Raises:
            InvariantError: an id is not an owned block (freed twice, or never of this pool).
        """
        for block_id in ids:
            if not 0 < block_id < self.num_blocks:
                raise InvariantError(f"Block {block_id} is not one of 1..{self.num_blocks - 1}.")
            if not self._owned[block_id]:
                raise InvariantError(f"Block {block_id} is freed, but nobody owns it.")
            self._owned[block_id] = 0
            self._free.append(block_id)
