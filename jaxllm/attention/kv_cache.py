"""The KV cache: one preallocated array per layer, pages of fixed size, donated from step to step.

Layout ``[pages, 2, kv_heads, page_size, head_dim]``: the keys (or values) of one page and head are
contiguous, so a kernel fetches them in one transfer. A layer whose values are a part of its keys
has 1 in the place of 2, and a backend may store wider heads than a layer's; the plan says how wide
(``EnginePlan.cache_head_dims``). Layers are separate arrays because a stacked one would be copied
by XLA when it is sliced per layer, and because their pages may differ in shape.
"""

import math

import jax
import jax.numpy as jnp

from jaxllm.attention.backend import AttentionSpec
from jaxllm.config.model import ModelConfig
from pallas_kernels.kv_write.narrow import FP8

KVCache = tuple[jax.Array, ...]  # one [P, 2 or 1, K, B, D] per layer


def page_shape(
    spec: AttentionSpec, block_size: int, head_dim: int | None = None
) -> tuple[int, int, int, int]:
    """Of one layer. ``head_dim``: of the cache, None where it is the layer's."""
    parts = 2 if spec.value_dim is None else 1
    return (parts, spec.num_kv_heads, block_size, head_dim or spec.head_dim)


def bytes_per_block(
    config: ModelConfig, block_size: int, dtype: str, head_dims: tuple[int, ...] = ()
) -> int:
    """Bytes of one block over all layers. ``head_dims``: as in EnginePlan.cache_head_dims."""
    elements = sum(map(math.prod, _pages(config, block_size, head_dims)))
    return elements * jnp.dtype(dtype).itemsize


def stored_dtype(page_dtype: str) -> str:
    """Float8 is kept as bytes: pallas_kernels/kv_write/narrow.py says why."""
    return FP8 if page_dtype == "float8_e4m3fn" else page_dtype


def kv_cache_spec(
    config: ModelConfig,
    num_blocks: int,
    block_size: int,
    dtype: str,
    head_dims: tuple[int, ...] = (),
) -> tuple[jax.ShapeDtypeStruct, ...]:
    pages = _pages(config, block_size, head_dims)
    stored = jnp.dtype(stored_dtype(dtype))
    return tuple(jax.ShapeDtypeStruct((num_blocks, *page), stored) for page in pages)


def most_padded(config: ModelConfig, head_dims: tuple[int, ...]) -> tuple[int, int]:
    """Channels of a head and of its place in pages, in the layer where they differ most."""
    own = [AttentionSpec.of(config, layer).head_dim for layer in range(config.num_layers)]
    return max(zip(own, head_dims or own, strict=True), key=lambda dims: dims[1] / dims[0])


def _pages(
    config: ModelConfig, block_size: int, head_dims: tuple[int, ...]
) -> list[tuple[int, int, int, int]]:
    specs = [AttentionSpec.of(config, layer) for layer in range(config.num_layers)]
    wide = head_dims or [None] * len(specs)
    return [page_shape(spec, block_size, dim) for spec, dim in zip(specs, wide, strict=True)]
