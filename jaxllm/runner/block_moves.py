"""Programs that move whole KV-cache blocks, a fixed number at a time."""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, batched
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.attention.kv_cache import KVCache

BLOCKS_PER_MOVE = 8
Moves = Sequence[tuple[int, int]]


def copy_blocks(kv: KVCache, moves: Int[Array, "2 N"]) -> KVCache:
    """Copy block ``moves[0, i]`` to ``moves[1, i]`` in every layer, all at once. A target past the
    cache is padding. In place when ``kv`` is donated.
    """
    sources, targets = moves
    return tuple(layer.at[targets].set(layer[sources], mode="drop") for layer in kv)


def save_blocks(kv: KVCache, ids: Int[Array, " N"]) -> tuple[Float[Array, " E"], ...]:
    """Each block of all layers, one after the other: their pages may differ in shape. An id past
    the cache is padding."""
    count = ids.shape[0]
    found = [layer.at[ids].get(mode="clip") for layer in kv]
    layers = [_as_dtype(content, kv[0].dtype).reshape(count, -1) for content in found]
    blocks = jnp.concatenate(layers, axis=1)
    return tuple(blocks[i] for i in range(count))


def load_blocks(
    kv: KVCache, ids: Int[Array, " N"], blocks: tuple[Float[Array, " E"], ...]
) -> KVCache:
    """Put blocks back. An id past the cache is padding. In place when ``kv`` is donated."""
    ends = list(accumulate(_elements(layer, kv[0].dtype) for layer in kv))
    layers = jnp.split(jnp.stack(blocks), ends[:-1], axis=1)
    return tuple(
        layer.at[ids].set(_as_page(content, layer), mode="drop")
        for layer, content in zip(kv, layers, strict=True)
    )


def _as_dtype(content: Array, dtype: Any) -> Array:
    """A block is one array of one dtype, that of pages; numbers of tokens are bits of it."""
    return content if content.dtype == dtype else lax.bitcast_convert_type(content, dtype)


def _as_page(content: Float[Array, "N E"], layer: Array) -> Array:
    shape = (len(content), *layer.shape[1:])
    if content.dtype == layer.dtype:
        return content.reshape(shape)
    parts = layer.dtype.itemsize // content.dtype.itemsize
    return lax.bitcast_convert_type(content.reshape(*shape, parts), layer.dtype)


def _elements(layer: Any, dtype: Any) -> int:
    """Of one block in one layer, in units of ``dtype``, which may be narrower."""
    return math.prod(layer.shape[1:]) * (layer.dtype.itemsize // jnp.dtype(dtype).itemsize)


def in_parts(moves: Moves, padding: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Of up to BLOCKS_PER_MOVE moves each: where from, and where to (int32, padded)."""
    for part in batched(moves, BLOCKS_PER_MOVE):
        targets = np.full(BLOCKS_PER_MOVE, padding, np.int32)
        targets[: len(part)] = [target for _, target in part]
        yield [source for source, _ in part], targets


def abstract_ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*shape, BLOCKS_PER_MOVE), np.int32)


def abstract_blocks(kv: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """``kv``: the cache's layers or their specs."""
    elements = sum(_elements(layer, kv[0].dtype) for layer in kv)
    block = jax.ShapeDtypeStruct((elements,), kv[0].dtype)
    return (block,) * BLOCKS_PER_MOVE
