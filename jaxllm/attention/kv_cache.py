"""The KV cache: one preallocated array per layer, pages of fixed size, donated from step to step.

Layout ``[pages, 2, kv_heads, page_size, head_dim]``: the keys (or values) of one page and head are
contiguous, so a kernel fetches them in one transfer. A backend may store wider heads than the
model's (``AttentionBackend.cache_head_dim``); the plan says how wide. Layers are separate arrays
because a stacked one would be copied by XLA when it is sliced per layer.
"""

import math

import jax
import jax.numpy as jnp

from jaxllm.config.model import ModelConfig
from pallas_kernels.kv_write.narrow import FP8

KVCache = tuple[jax.Array, ...]  # one [P, 2, K, B, D] per layer


def page_shape(
    config: ModelConfig, block_size: int, head_dim: int | None = None
) -> tuple[int, int, int, int]:
    """``head_dim``, here and below: of the cache, None where it is the model's."""
    return (2, config.num_kv_heads, block_size, head_dim or config.head_dim)


def bytes_per_block(
    config: ModelConfig, block_size: int, dtype: str, head_dim: int | None = None
) -> int:
    """Bytes of one block over all layers."""
    elements = math.prod(page_shape(config, block_size, head_dim))
    return config.num_layers * elements * jnp.dtype(dtype).itemsize


def stored_dtype(page_dtype: str) -> str:
    """Float8 is kept as bytes: pallas_kernels/kv_write/narrow.py says why."""
    return FP8 if page_dtype == "float8_e4m3fn" else page_dtype


def kv_cache_spec(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: str, head_dim: int | None = None
) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = (num_blocks, *page_shape(config, block_size, head_dim))
    stored = jnp.dtype(stored_dtype(dtype))
    return (jax.ShapeDtypeStruct(shape, stored),) * config.num_layers
