"""Softmax-weighted sums over a stretch of tokens, and how the decode kernels join them.

A row is summed in splits, splits are joined into chunks in order, chunks into the row in order.
One CTA may walk them all, or several CTAs leave partial sums that the combine kernel joins: both
call the functions of this file, and must get the same bits.

They do because maxima are whole numbers. A sum is scaled by a power of two, which is exact short
of underflow, so each element is rounded once per join, in its one addition, and it makes no
difference whether a compiler contracts products and addition into fused multiply-adds. To join
the empty sum changes nothing.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

MASKED = -1e30
LOG2E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
TILE = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)

Ref = Any  # a GMEM, SMEM or barrier reference inside a kernel


class Sum(NamedTuple):
    """``values / total`` is attention over the stretch. D may be a slice of the head dim."""

    values: Float[Array, "D N"]
    total: Float[Array, " N"]  # of the weights 2 ** (logit - maximum)
    maximum: Float[Array, " N"]  # whole, within one of the largest base-2 logit


def filled(sizes: tuple[int, ...], value: float) -> Array:
    """A constant in the layout of a tile, or of its columns."""
    layout = WGMMA if len(sizes) == 2 else WGMMA.reduce(0)
    return plgpu.layout_cast(jnp.full(sizes, value, jnp.float32), layout)


def empty_sum(dim: int, heads: int) -> Sum:
    return Sum(filled((dim, heads), 0.0), filled((heads,), 0.0), filled((heads,), MASKED))


def across(columns: Float[Array, " N"], like: Float[Array, "D N"]) -> Float[Array, "D N"]:
    return lax.broadcast_in_dim(columns, like.shape, (1,))


def join(left: Sum, right: Sum) -> Sum:
    maximum = jnp.maximum(left.maximum, right.maximum)
    a, b = power_of_two(left.maximum - maximum), power_of_two(right.maximum - maximum)
    return Sum(
        left.values * across(a, left.values) + right.values * across(b, right.values),
        left.total * a + right.total * b,
        maximum,
    )


def sink_sum(logits: Float[Array, " N"], dim: int) -> Sum:
    """A logit per head without a value, as a sum that can be joined."""
    scaled = logits * LOG2E
    maximum = whole(scaled)
    zeros = filled((dim, logits.shape[0]), 0.0)
    return Sum(zeros, jnp.exp2(scaled - maximum), maximum)


def whole(logits: Array) -> Array:
    return logits.astype(jnp.int32).astype(jnp.float32)


def power_of_two(exponent: Array) -> Array:
    """Of a whole number up to 0, from its bits: the hardware's exp2 does not promise to be exact.
    Zero below the smallest normal number."""
    biased = jnp.maximum(exponent, -127.0).astype(jnp.int32) + 127
    return lax.bitcast_convert_type(biased << 23, jnp.float32)


def store_values(values: Ref, partial: Sum) -> None:
    """Straight from registers: eight heads of a value are one sector of memory."""
    _store(values, partial.values)


def store_stats(stats: Ref, partial: Sum) -> None:
    _store(stats.at[0], partial.total)
    _store(stats.at[1], partial.maximum)


def _store(target: Ref, value: Array) -> None:
    """JAX 0.12 wants to be told that a store to GMEM may leave cache lines unfilled; 0.11 has no
    word for it."""
    if store := getattr(plgpu, "store", None):
        store(target, value, optimized=False)
    else:
        target[...] = value


def load_partial(values: Ref, stats: Ref) -> Sum:
    columns = WGMMA.reduce(0)
    return Sum(
        plgpu.load(values, layout=WGMMA, optimized=False),
        plgpu.load(stats.at[0], layout=columns, optimized=False),
        plgpu.load(stats.at[1], layout=columns, optimized=False),
    )


def store_answer(row: Sum, staging: Ref, out: Ref) -> None:
    """``out`` may have fewer heads than ``staging``: those past its end are not written."""
    inverse = 1.0 / jnp.maximum(row.total, 1e-30)
    answer = row.values * across(inverse, row.values)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy before has read the staging buffer
    narrow = plgpu.layout_cast(answer.astype(staging.dtype), _TRANSPOSED)
    staging.transpose((1, 0))[...] = narrow
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out)
