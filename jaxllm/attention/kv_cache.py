"""The KV cache: one preallocated array per layer, pages of fixed size, donated from step to step.

Layout ``[pages, 2, kv_heads, page_size, head_dim]``: the keys (or values) of one page and head are
contiguous, so a kernel fetches them in one transfer. A layer whose values are a part of its keys
has 1 in the place of 2, and a backend may store wider heads than a layer's; the plan says how wide
(``EnginePlan.cache_head_dims``). Layers are separate arrays because a stacked one would be copied
by XLA when it is sliced per layer, and because their pages may differ in shape.

A layer whose variant has per_token params keeps them in an array of its own, float32
``[pages, params, kv_heads, page_size]``, with the same page numbers. These arrays come after the
pages of all layers; ``by_layer`` brings both together.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.attention.backend import AttentionSpec
from jaxllm.config.model import ModelConfig
from pallas_kernels.kv_write.narrow import FP8

# One [P, 2 or 1, K, B, D] per layer, then one [P, N, K, B] per layer that keeps numbers of tokens.
KVCache = tuple[jax.Array, ...]


class TokenPages(NamedTuple):
    """Pages of a layer whose variant has N per_token params."""

    kv: jax.Array  # [P, 2 or 1, K, B, D]
    tokens: jax.Array  # [P, N, K, B] float32


LayerPages = jax.Array | TokenPages


def split_pages(pages: LayerPages) -> tuple[jax.Array, jax.Array | None]:
    return pages if isinstance(pages, TokenPages) else (pages, None)


def by_layer(config: ModelConfig, cache: KVCache) -> list[LayerPages]:
    rest = iter(cache[config.num_layers :])
    return [
        TokenPages(pages, next(rest)) if _keeps_tokens(config, layer) else pages
        for layer, pages in enumerate(cache[: config.num_layers])
    ]


def from_layers(layers: Sequence[LayerPages]) -> KVCache:
    pairs = [split_pages(pages) for pages in layers]
    return (*(kv for kv, _ in pairs), *(tokens for _, tokens in pairs if tokens is not None))


def page_shape(
    spec: AttentionSpec, block_size: int, head_dim: int | None = None
) -> tuple[int, int, int, int]:
    """Of one layer. ``head_dim``: of the cache, None where it is the layer's."""
    parts = 2 if spec.value_dim is None else 1
    return (parts, spec.num_kv_heads, block_size, head_dim or spec.head_dim)


def token_shape(spec: AttentionSpec, block_size: int) -> tuple[int, int, int]:
    """Of one layer that keeps numbers of tokens."""
    return (len(spec.variant.token_params), spec.num_kv_heads, block_size)


def bytes_per_block(
    config: ModelConfig, block_size: int, dtype: str, head_dims: tuple[int, ...] = ()
) -> int:
    """Bytes of one block over all layers. ``head_dims``: as in EnginePlan.cache_head_dims."""
    elements = sum(map(math.prod, _pages(config, block_size, head_dims)))
    numbers = sum(map(math.prod, _token_pages(config, block_size)))
    return elements * jnp.dtype(dtype).itemsize + 4 * numbers


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
    return (
        *(jax.ShapeDtypeStruct((num_blocks, *page), stored) for page in pages),
        *(
            jax.ShapeDtypeStruct((num_blocks, *page), jnp.float32)
            for page in _token_pages(config, block_size)
        ),
    )


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


def _token_pages(config: ModelConfig, block_size: int) -> list[tuple[int, int, int]]:
    layers = [layer for layer in range(config.num_layers) if _keeps_tokens(config, layer)]
    return [token_shape(AttentionSpec.of(config, layer), block_size) for layer in layers]


def _keeps_tokens(config: ModelConfig, layer: int) -> bool:
    return bool(AttentionSpec.of(config, layer).variant.token_params)
