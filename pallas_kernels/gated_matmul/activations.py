"""What a gate passes through: plain XLA's form of it, and where a kernel has it too."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x / (1.0 + jnp.exp(-x))  # jax.nn.silu's logistic does not lower in Mosaic


XLA_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # Hugging Face's "gelu" is the exact one
    "gelu_pytorch_tanh": jax.nn.gelu,
}

# On a tile in registers. The exact gelu's erf does not lower.
ACTIVATIONS = {"silu": _silu, "gelu_pytorch_tanh": jax.nn.gelu}
