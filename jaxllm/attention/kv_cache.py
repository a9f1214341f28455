"""The KV cache: one preallocated array per layer, pages of fixed size, donated from step to step.

Layout ``[pages, 2, kv_heads, page_size, head_dim]``: the keys (or values) of one page and head are
contiguous, so a kernel fetches them in one transfer. A layer whose values are a part of its keys
has 1 in the place of 2. Layers are separate arrays because a stacked one would be copied by XLA
when it is sliced per layer, and because their pages may differ in shape.
"""

import math

import jax
import jax.numpy as jnp

from jaxllm.attention.backend import AttentionSpec
from jaxllm.config.model import ModelConfig

KVCache = tuple[jax.Array, ...]  # one [P, 2 or 1, K, B, D] per layer


def page_shape(spec: AttentionSpec, block_size: int) -> tuple[int, int, int, int]:
    """Of one layer."""
    parts = 2 if spec.value_dim is None else 1
    return (parts, spec.num_kv_heads, block_size, spec.head_dim)


def bytes_per_block(config: ModelConfig, block_size: int, dtype: str) -> int:
    """Bytes of one block over all layers."""
    elements = sum(map(math.prod, _pages(config, block_size)))
    return elements * jnp.dtype(dtype).itemsize


def kv_cache_spec(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: str
) -> tuple[jax.ShapeDtypeStruct, ...]:
    pages = _pages(config, block_size)
    return tuple(jax.ShapeDtypeStruct((num_blocks, *page), jnp.dtype(dtype)) for page in pages)


def _pages(config: ModelConfig, block_size: int) -> list[tuple[int, int, int, int]]:
    layers = range(config.num_layers)
    return [page_shape(AttentionSpec.of(config, layer), block_size) for layer in layers]
