"""The contract of truncated sampling, as the shortest float32 program that is right. It sorts."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_NEG_INF = float("-inf")


def sample_reference(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    min_p: Float[Array, " R"],
    seed: Int[Array, "R 2"],
    position: Int[Array, " R"],
) -> Int[Array, " R"]:
    """One token per row: divide by temperature, min-p, top-k, top-p, Gumbel-max draw; see api.py.

    The noise is ``jax.random.gumbel`` under the threefry key of ``seed`` folded with ``position``.
    """
    greedy = temperature == 0
    x = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    threshold = thresholds_reference(x, top_k, top_p, min_p)

    def noise(words: Array, counter: Array) -> Array:
        key = jax.random.wrap_key_data(words.astype(jnp.uint32), impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, counter), x.shape[1:], jnp.float32)

    kept = jnp.where(x >= threshold[:, None], x, _NEG_INF)
    drawn = jnp.argmax(kept + jax.vmap(noise)(seed, position), axis=-1)
    return jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def thresholds_reference(
    x: Float[Array, "R V"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    min_p: Float[Array, " R"],
) -> Float[Array, " R"]:
    """Least value that min-p, then top-k, then top-p keep. Values that tie with it are all kept."""

    def row(x: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
        falling = -jnp.sort(-x)
        floor = falling[0] + jnp.where(min_p > 0, jnp.log(min_p), _NEG_INF)
        kth = falling[jnp.clip(top_k, 1, x.shape[0]) - 1]
        cut = jnp.maximum(jnp.where(top_k > 0, kth, _NEG_INF), floor)
        weights = jnp.where(falling >= cut, jnp.exp(falling - falling[0]), 0.0)
        mass = jnp.cumsum(weights)
        enough = mass >= top_p * mass[-1]
        nucleus = jnp.maximum(falling[jnp.argmax(enough)], cut)
        return lax.select(top_p < 1.0, nucleus, cut)

    return jax.vmap(row)(x, top_k, top_p, min_p)
