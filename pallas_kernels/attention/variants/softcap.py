"""Soft-capped logits: x becomes cap tanh(x / cap) (Gemma 2, arXiv:2408.00118)."""

from types import SimpleNamespace

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param


def _cap(score: Array, q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    return params.cap * jnp.tanh(score / params.cap)


SOFTCAP = AttentionVariant(
    "softcap", score_mod=_cap, params=(Param("cap", "per_layer", default=50.0),)
)
