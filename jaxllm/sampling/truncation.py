"""top-k, top-p and min-p by searching a threshold, never by sorting the vocabulary.

float32 values map to uint32 keys of the same order, and the threshold is built bit by bit: 32
counting passes give the exact k-th largest value, or the exact edge of the nucleus, of every row
at once. Tokens that tie with the threshold are all kept.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxllm.sampling.metadata import SamplingMetadata

NEG_INF = float("-inf")


def truncate(x: Float[Array, "R V"], md: SamplingMetadata) -> Float[Array, "R V"]:
    """Logits outside min-p, then top-k, then top-p become -inf (Holtzman et al. 2019,
    arXiv:1904.09751; min-p: Nguyen et al. 2024, arXiv:2407.01082). ``x`` is already divided by
    temperature."""
    top = x.max(axis=-1, keepdims=True)
    floor = top + jnp.where(md.min_p > 0, jnp.log(md.min_p), NEG_INF)[:, None]
    x = jnp.where(x >= floor, x, NEG_INF)
    x = _keep_top_k(x, md.top_k)
    return _keep_top_p(x, md.top_p)


def _keep_top_k(x: Float[Array, "R V"], top_k: Int[Array, " R"]) -> Float[Array, "R V"]:
    keys = _ordered(x)

    def enough(at_least: UInt[Array, "R 1"]) -> Bool[Array, " R"]:
        return jnp.sum(keys >= at_least, axis=-1, dtype=jnp.int32) >= top_k

    threshold = _largest(enough, x.shape[0])
    return jnp.where((keys >= threshold[:, None]) | (top_k <= 0)[:, None], x, NEG_INF)


def _keep_top_p(x: Float[Array, "R V"], top_p: Float[Array, " R"]) -> Float[Array, "R V"]:
    keys = _ordered(x)
    weights = jnp.exp(x - x.max(axis=-1, keepdims=True))
    needed = top_p * weights.sum(axis=-1)

    def enough(at_least: UInt[Array, "R 1"]) -> Bool[Array, " R"]:
        return jnp.where(keys >= at_least, weights, 0.0).sum(axis=-1) >= needed

    threshold = _largest(enough, x.shape[0])
    return jnp.where((keys >= threshold[:, None]) | (top_p >= 1.0)[:, None], x, NEG_INF)


def _ordered(x: Float[Array, "R V"]) -> UInt[Array, "R V"]:
    """uint32 keys that compare like the floats they come from."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(
    enough: Callable[[UInt[Array, "R 1"]], Bool[Array, " R"]], rows: int
) -> UInt[Array, " R"]:
    """The largest key for which ``enough`` (monotone: true up to some key) still holds, per row."""

    def bit(index: Int[Array, ""], found: UInt[Array, " R"]) -> UInt[Array, " R"]:
        candidate = found | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(enough(candidate[:, None]), candidate, found)

    return lax.fori_loop(0, 32, bit, jnp.zeros((rows,), jnp.uint32))
