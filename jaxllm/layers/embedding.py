"""Token embedding, and the projection back to the vocabulary."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.layers.linear import matmul
from jaxllm.parallel.cuts import AXIS, Cut, first_own, gathered, parts


class Embedding(nnx.Module):
    """Of ``shards`` devices each has a share of the vocabulary, where it comes out even."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, shards: int = 1):
        self.parts = parts(vocab_size, shards)
        rows = vocab_size // self.parts
        self.weight = nnx.Param(jnp.zeros((rows, hidden_size), dtype))
        if self.parts > 1:
            self.weight.set_metadata(cut=Cut(0, (rows,)))

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T E"]:
        weight = self.weight[...]
        if self.parts == 1:
            return weight[tokens]
        place = tokens - first_own(weight.shape[0])
        here = (place >= 0) & (place < weight.shape[0])
        found = jnp.where(here[:, None], weight[jnp.where(here, place, 0)], 0)
        return lax.psum(found, AXIS)  # zeros but for one device: exact in any order

    def attend(self, hidden: Float[Array, "N E"]) -> Float[Array, "N V"]:
        """Logits, float32: of tied embeddings, or of a matrix of their own."""
        logits = matmul(hidden, self.weight[...], jnp.dtype(jnp.float32))
        return gathered(logits, self.parts)
