"""Which blocks hold the keys and values of which tokens. Knows hashes and blocks, no requests.

A full block is found by the hash of everything that its contents depend on: all tokens up to its
end, by a chain of hashes (as in vLLM), and what the chain began with. A block that is full to a
part, or whose tokens differ from the wanted ones from some point on, is found through the block
before it and can be copied.
"""

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

HASH_BYTES = 16
MOST_CONTINUATIONS = 8  # of one block that are remembered for copying; the newest


class BlockHasher:
    """Keyed, so that nobody who does not know the key can make up two texts of one hash."""

    def __init__(self, key: bytes, block_size: int):
        self._key = key
        self._block_size = block_size

    def root(self, *identity: str) -> bytes:
        """Where a chain begins: everything but tokens that keys and values depend on, and the
        salt that keeps users apart.
        """
        digest = blake2b(key=self._key, digest_size=HASH_BYTES)
        for part in identity:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()

    def extend(self, chain: list[bytes], token_ids: np.ndarray) -> None:
        """Append the hashes of the full blocks in ``token_ids`` (int32), which begin where the
        chain (its root first) ends.
        """
        size = self._block_size
        for start in range(0, token_ids.size - size + 1, size):
            block = token_ids[start : start + size].tobytes()
            chain.append(blake2b(chain[-1] + block, key=self._key, digest_size=HASH_BYTES).digest())


@dataclass(slots=True)
class CachedBlock:
    parent: bytes  # hash of the chain up to this block
    token_ids: np.ndarray  # int32; of a full block all
    hash: bytes | None  # None: not full


class PrefixCache:
    """An index of blocks with contents. Whether they are still there is the pool's to say."""

    def __init__(self) -> None:
        self._full: dict[bytes, int] = {}
        self._blocks: dict[int, CachedBlock] = {}
        self._continuations: dict[bytes, OrderedDict[int, None]] = {}

    def __contains__(self, block_hash: bytes) -> bool:
        """Whether a full block of that hash is known."""
        return block_hash in self._full

    def block_ids(self) -> set[int]:
        return set(self._blocks)

    def find(self, block_hash: bytes) -> int | None:
        """The full block of that hash."""
        return self._full.get(block_hash)

    def hash_of(self, block_id: int) -> bytes | None:
        """None: the block is unknown or not full."""
        block = self._blocks.get(block_id)
        return None if block is None else block.hash

    def find_similar(self, parent: bytes, token_ids: np.ndarray) -> tuple[int, int]:
        """(block, number of its first tokens that are the wanted ones), the most there are; the
        number is 0 where there is none. The block follows ``parent``.
        """
        best = (0, 0)
        for block_id in reversed(self._continuations.get(parent, ())):
            common = _num_common(self._blocks[block_id].token_ids, token_ids)
            if common > best[1]:
                best = (block_id, common)
        return best

    def add(
        self, block_id: int, parent: bytes, token_ids: np.ndarray, block_hash: bytes | None
    ) -> int | None:
        """Note what a block holds; ``block_hash`` if it is full, and new. Tokens of a block that
        is noted already are the beginning of these.

        Returns a block that has thereby been forgotten: full to a part only, it could be found
        among the continuations alone, and newer ones have taken its place.
        """
        if block_hash is not None:
            self._full[block_hash] = block_id
        self._blocks[block_id] = CachedBlock(parent, token_ids, block_hash)
        siblings = self._continuations.setdefault(parent, OrderedDict())
        siblings[block_id] = None
        siblings.move_to_end(block_id)
        if len(siblings) <= MOST_CONTINUATIONS:
            return None
        oldest, _ = siblings.popitem(last=False)
        if self._blocks[oldest].hash is not None:
            return None
        del self._blocks[oldest]
        return oldest

    def discard(self, block_id: int) -> None:
        """Forget the block, if it is known."""
        block = self._blocks.pop(block_id, None)
        if block is None:
            return
        if block.hash is not None:
            del self._full[block.hash]
        siblings = self._continuations.get(block.parent)
        if siblings is not None:
            siblings.pop(block_id, None)
            if not siblings:
                del self._continuations[block.parent]


def _num_common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    length = min(a.size, b.size)
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if differ.size else length
