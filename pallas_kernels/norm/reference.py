"""The contract of residual add and RMS norm, as the shortest float32 program that is right."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def add_rms_norm_reference(
    x: Float[Array, "T N"],
    branch: Float[Array, "T N"],
    weight: Float[Array, " N"],
    *,
    eps: float,
) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
    """``(s / rms(s) * weight, s)`` where ``s = x + branch``, row by row (Zhang & Sennrich 2019,
    arXiv:1910.07467). Both results are float32, rounded nowhere.
    """
    total = x.astype(jnp.float32) + branch.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(total * total, axis=-1, keepdims=True) + eps)
    return total * scale * weight.astype(jnp.float32)[None], total
