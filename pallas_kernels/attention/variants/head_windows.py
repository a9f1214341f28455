"""A sliding window of its own for every head (MoA, arXiv:2406.14909). Pages that no head sees
are not read.
"""

from types import SimpleNamespace

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param


def windows(num_heads: int) -> tuple[int, ...]:
    """Doubling from 128 to 4096, again and again."""
    return tuple(128 << (head % 6) for head in range(num_heads))


def _near(q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    return q_pos - kv_pos < params.windows


def _widest(q_first: Array, q_last: Array, params: SimpleNamespace) -> tuple[Array, Array]:
    return q_first - jnp.max(params.windows) + 1, q_last


HEAD_WINDOWS = AttentionVariant(
    "head_windows",
    mask_mod=_near,
    kv_range=_widest,
    params=(Param("windows", "per_head", default=windows, dtype="int32"),),
)
