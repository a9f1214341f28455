"""The skinny products as plain XLA."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def skinny_matmul_xla(
    x: Float[Array, "M K"], w: Float[Array, "N K"], *, out_dtype: Any
) -> Float[Array, "M N"]:
    """``x @ w.T`` without materialising the transpose."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)


def gated_matmul_xla(x: Float[Array, "M K"], w: Float[Array, "N K"]) -> Float[Array, "M H"]:
    """Gate and up are rounded to ``x``'s dtype before the activation."""
    gate, up = jnp.split(skinny_matmul_xla(x, w, out_dtype=x.dtype), 2, axis=-1)
    return jax.nn.silu(gate) * up
