"""A bias that a request brings for a span of its tokens: to stress or to fade part of a prompt
(after post-hoc attention steering, Zhang et al. 2023, arXiv:2311.02262).
"""

from types import SimpleNamespace

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param


def _steer(
    score: Array, q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace
) -> Array:
    first, end = params.span
    return jnp.where((kv_pos >= first) & (kv_pos < end), score + params.bias, score)


REQUEST_BIAS = AttentionVariant(
    "request_bias",
    score_mod=_steer,
    params=(
        Param("bias", "per_row", default=0.0),
        Param("span", "per_row", default=0, size=2, dtype="int32"),
    ),
)
