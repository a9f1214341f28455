"""The gated product as plain XLA: one product with both weights, then the activation."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.gated_matmul.activations import XLA_ACTIVATIONS


def gated_matmul_xla(
    x: Float[Array, "T E"], weight: Float[Array, "N2 E"], *, activation: str
) -> Float[Array, "T N"]:
    """See ``api.py``. Both products are rounded to ``x``'s dtype before the activation."""
    gate, up = jnp.split(lax.dot_general(x, weight, (((1,), (1,)), ((), ()))), 2, axis=-1)
    return XLA_ACTIVATIONS[activation](gate) * up
