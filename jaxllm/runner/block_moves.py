"""Programs that move whole KV-cache blocks, a fixed number at a time."""

import jax
import numpy as np
from jaxtyping import Array, Int

from jaxllm.attention.kv_cache import KVCache

BLOCKS_PER_MOVE = 16


def copy_blocks(kv: KVCache, moves: Int[Array, "2 N"]) -> KVCache:
    """Copy block ``moves[0, i]`` to ``moves[1, i]`` in every layer, all at once. A target past the
    cache is padding. In place when ``kv`` is donated.
    """
    sources, targets = moves
    return tuple(layer.at[targets].set(layer[sources], mode="drop") for layer in kv)


def packed_moves(moves: tuple[tuple[int, int], ...], num_blocks: int) -> np.ndarray:
    """int32 [2, BLOCKS_PER_MOVE] of at most that many (from, to)."""
    packed = np.full((2, BLOCKS_PER_MOVE), num_blocks, np.int32)
    packed[0] = 0
    packed[:, : len(moves)] = np.array(moves, np.int32).T
    return packed


def abstract_moves() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, BLOCKS_PER_MOVE), np.int32)
