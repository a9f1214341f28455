"""Token embedding, and the projection back to the vocabulary."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.linear import matmul


class Embedding(nnx.Module):
    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros((vocab_size, hidden_size), dtype))

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T E"]:
        return self.weight[...][tokens]

    def attend(self, hidden: Float[Array, "N E"]) -> Float[Array, "N V"]:
        """Logits of tied embeddings, float32."""
        return matmul(hidden, self.weight[...], jnp.dtype(jnp.float32))
