"""What the sampling kernels share: how a row is walked tile by tile."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sampling.sample_config import TILE, VECTOR


def layout() -> Any:
    """A tile over the 128 threads: contiguous vectors, one warp's next to each other."""
    tiling = plgpu.Tiling(((TILE,), (32 * VECTOR,), (VECTOR,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def full(value: Any, dtype: Any = jnp.float32) -> jax.Array:
    return plgpu.layout_cast(jnp.full((TILE,), value, dtype), layout())


def load(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout(), optimized=False)


def load_tile(ref: Any, row: Any, start: Any) -> tuple[jax.Array, jax.Array]:
    """Values and token ids of one tile. A tile past the end is moved back into the row, and what an
    earlier tile has seen becomes -inf."""
    first = jnp.minimum(start, ref.shape[1] - TILE)
    value = load(ref.at[row, pl.ds(first, TILE)])
    token = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout()) + first
    return jnp.where(token >= start, value, -jnp.inf), token


def over_columns(
    begin: Any, columns: Any, unroll: int, block: Callable[[Any, Any], Any], carry: Any
) -> Any:
    """Runs ``block(start, carry)`` for every ``unroll`` tiles of these columns."""
    size = unroll * TILE
    blocks = lax.div(jnp.int32(columns) + (size - 1), jnp.int32(size))
    return lax.fori_loop(0, blocks, lambda i, c: block(begin + i * size, c), carry)
