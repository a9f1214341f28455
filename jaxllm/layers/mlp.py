"""The gated feed-forward block (Shazeer 2020, arXiv:2002.05202), gate and up fused in one
product.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.config.model import ModelConfig
from jaxllm.layers.linear import Linear

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # Hugging Face's "gelu" is the exact one
    "gelu_pytorch_tanh": jax.nn.gelu,
}


class GatedMLP(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = Linear(hidden, 2 * inner, bias=config.mlp_bias, dtype=dtype)
        self.down = Linear(inner, hidden, bias=config.mlp_bias, dtype=dtype)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(ACTIVATIONS[self.hidden_act](gate) * up)
