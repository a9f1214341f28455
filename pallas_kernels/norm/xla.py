"""RMS norm as plain XLA, which fuses a residual add into it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B N"], weight: Float[Array, " N"], *, eps: float
) -> Float[Array, "*B N"]:
    """``x / rms(x) * weight`` over the last axis, in float32 up to the product with the weight."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def add_rms_norm_xla(
    x: Float[Array, "T N"],
    branch: Float[Array, "T N"],
    weight: Float[Array, " N"],
    *,
    eps: float,
) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
    """``add_rms_norm_reference`` with results in ``x``'s dtype; the norm is of the rounded sum."""
    total = x + branch
    return rms_norm(total, weight, eps=eps), total
