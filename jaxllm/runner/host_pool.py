"""Contents of KV-cache blocks in the host's memory, by slot.

The pages of that memory are locked (JAX calls it ``pinned_host``), so that the device's copy
engines read and write it at the speed of the link while the device computes.

No array is ever written into: a slot is given another one, and one that is still read or written
lives until that is done. So no order of calls can mix up two blocks, whatever copies are under
way; and what a save has taken from the cache is a copy, which later steps do not touch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from jaxllm.errors import OutOfMemoryError
from jaxllm.parallel.mesh import KV_BLOCK, DeviceMesh
from jaxllm.runner.block_moves import BLOCKS_PER_MOVE

MOVES_ALIVE = 4  # saves whose blocks are on the device a second time, on their way to the host
_RESERVED_AT_ONCE = 64  # blocks
_ON_THEIR_WAY = 2 * MOVES_ALIVE * BLOCKS_PER_MOVE  # blocks, to the host and back

Keep = Callable[[bytes, jax.Array], None]


def lock_memory(count: int, block: jax.ShapeDtypeStruct, devices: DeviceMesh) -> None:
    """Let JAX lock the pages of ``count`` blocks now, and of as many as may be on their way beside
    them. That takes a second or two for 4 GiB, for which no step should wait; and were one block
    missing later, it would lock as much again as it has. ``block``: of all devices together.

    Raises:
        OutOfMemoryError: the host has not so much memory that can be locked.
    """
    if not count:
        return
    zeros, held = np.zeros(block.shape, block.dtype), list[list[jax.Array]]()
    count += _ON_THEIR_WAY
    try:
        for done in range(0, count, _RESERVED_AT_ONCE):
            part = [zeros] * min(count - done, _RESERVED_AT_ONCE)
            held.append(jax.block_until_ready(jax.device_put(part, devices.locked(KV_BLOCK))))
    except jax.errors.JaxRuntimeError as error:
        raise OutOfMemoryError(
            "The host has too little memory that can be locked for --swap-space and "
            f"--kv-offloading-size. Lower them. ({error})"
        ) from error


class HostPool:
    """``keep`` gets what is to have a file as well: it may not be there yet, ``np.asarray`` waits
    for it.
    """

    def __init__(self, keep: Keep, devices: DeviceMesh) -> None:
        self._here = devices.locked(KV_BLOCK)
        self._on_device = devices.placed(KV_BLOCK)
        self._keep = keep
        self._contents: dict[int, jax.Array] = {}
        self._leaving: deque[list[jax.Array]] = deque()

    def make_room(self, most: int = MOVES_ALIVE - 1) -> None:
        """Before blocks are saved: wait until no more than ``most`` saves are on their way."""
        while len(self._leaving) > most:
            jax.block_until_ready(self._leaving.popleft())

    def put(
        self, slots: Sequence[int], blocks: Sequence[jax.Array], names: Sequence[bytes | None]
    ) -> None:
        """Begin to fetch the blocks of one save, those with a name for a file as well. A slot given
        twice keeps the last.
        """
        for slot in slots:  # before others need its memory
            self._contents.pop(slot, None)
        arriving = self._to_host(blocks[: len(slots)])
        self._leaving.append(arriving)
        for slot, block, name in zip(slots, arriving, names, strict=True):
            self._contents[slot] = block
            if name is not None:
                self._keep(name, block)

    def fill(self, slot: int, content: np.ndarray) -> None:
        """What came from a file."""
        self._contents[slot] = jax.device_put(content, self._here)

    def get(self, slots: Sequence[int]) -> list[jax.Array]:
        """Begin to bring blocks back: they are on the device when who reads them runs."""
        return jax.device_put([self._contents[slot] for slot in slots], self._on_device)

    def bring(
        self, parts: Iterable[tuple[list[int], np.ndarray]]
    ) -> Iterator[tuple[np.ndarray, list[jax.Array]]]:
        """(ids, blocks) for each (slots, ids). The next blocks are begun to be brought before the
        last ones are used, which the device would wait for otherwise: on a GPU, memory that it is
        given now is written when all is done that has been dispatched.
        """
        begun: tuple[np.ndarray, list[jax.Array]] | None = None
        for slots, ids in parts:
            before, begun = begun, (ids, self.get(slots))
            if before is not None:
                yield before
        if begun is not None:
            yield begun

    def forget(self) -> None:
        """All slots are empty."""
        self._contents.clear()

    def _to_host(self, blocks: Sequence[jax.Array]) -> list[jax.Array]:
        return jax.device_put(list(blocks), self._here)
