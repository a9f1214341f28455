"""Attention with linear biases: a head's slope times the distance (Press et al. 2021,
arXiv:2108.12409).
"""

import math
from types import SimpleNamespace

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param


def slopes(num_heads: int) -> tuple[float, ...]:
    """The paper's: a geometric sequence for a power of two, else filled up with every other number
    of the next one."""
    power = 2 ** math.floor(math.log2(num_heads))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return (*first, *between)


def _bias(score: Array, q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    return score - params.slopes * (q_pos - kv_pos).astype(jnp.float32)


ALIBI = AttentionVariant(
    "alibi", score_mod=_bias, params=(Param("slopes", "per_head", default=slopes),)
)
