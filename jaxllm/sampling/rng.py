"""Counter-based randomness: noise depends on (seed, position, token) and on nothing else.

So a request draws the same tokens whatever shares its batch, wherever it sits in it, and after a
preemption.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gumbel_noise(
    seed: Int[Array, "R 2"], position: Int[Array, " R"], vocab_size: int
) -> Float[Array, "R V"]:
    """Gumbel(0, 1) noise; argmax(logits + noise) is a draw from softmax(logits)."""

    def row(words: Int[Array, " 2"], counter: Int[Array, ""]) -> Float[Array, " V"]:
        key = jax.random.wrap_key_data(words.astype(jnp.uint32), impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, counter), (vocab_size,), jnp.float32)

    return jax.vmap(row)(seed, position)


def seed_words(seed: int) -> tuple[int, int]:
    """The 64 bits of a request's seed as two int32 values, for the row state."""
    bits = seed & (2**64 - 1)

    def signed(word: int) -> int:
        return word - 2**32 if word >= 2**31 else word

    return signed(bits >> 32), signed(bits & 0xFFFFFFFF)
