"""The float32 oracle of the gated product."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_matmul.activations import XLA_ACTIVATIONS


def gated_matmul_reference(
    x: Float[Array, "T E"], weight: Float[Array, "N2 E"], *, activation: str
) -> Float[Array, "T N"]:
    """float32 throughout."""
    gate, up = jnp.split(weight.astype(jnp.float32), 2)
    x32 = x.astype(jnp.float32)
    first, second = (jnp.dot(x32, part.T, precision="highest") for part in (gate, up))
    return XLA_ACTIVATIONS[activation](first) * second
