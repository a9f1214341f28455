"""The contract of the skinny products, as the shortest float32 program that is right."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def skinny_matmul_reference(x: Float[Array, "M K"], w: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """``x @ w.T``, float32, rounded nowhere."""
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    return jnp.matmul(x, w.T, precision=lax.Precision.HIGHEST)


def gated_matmul_reference(x: Float[Array, "M K"], w: Float[Array, "N K"]) -> Float[Array, "M H"]:
    """``silu(gate) * up`` (Shazeer 2020, arXiv:2002.05202), ``w`` being the gate rows and then as
    many up rows."""
    gate, up = jnp.split(skinny_matmul_reference(x, w), 2, axis=-1)
    return jax.nn.silu(gate) * up
