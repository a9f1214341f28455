"""Truncated sampling in plain XLA: thresholds by searching the bits of the value, never by sorting.

float32 values map to uint32 keys of the same order. Each pass over the row settles ``bits`` bits of
the threshold: it counts (or weighs) what lies at or above ``2 ** bits - 1`` keys at once.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.sampling.noise import gumbel, row_keys

_NEG_INF = float("-inf")


def sample_xla(
    logits: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    min_p: Float[Array, " R"],
    seed: Int[Array, "R 2"],
    position: Int[Array, " R"],
    *,
    bits: int = 4,
    skip: bool = False,
) -> Int[Array, " R"]:
    """One token per row; see ``api.py``. With ``skip``, branches at run time leave out what no row
    asks for: on a CPU they cost nothing, but a GPU would wait for the host to read their
    conditions.
    """
    greedy = temperature == 0
    temperature = jnp.where(greedy, 1.0, temperature)
    top_k, top_p = jnp.where(greedy, 0, top_k), jnp.where(greedy, 1.0, top_p)

    def perturbed() -> Float[Array, "R V"]:
        threshold = thresholds_xla(logits, temperature, top_k, top_p, min_p, bits=bits, skip=skip)
        keys = row_keys(seed, position)
        token = jnp.arange(logits.shape[1], dtype=jnp.uint32)
        token = jnp.broadcast_to(token[None], logits.shape)
        noise = gumbel(keys[:, :1], keys[:, 1:], token)
        kept = (logits >= threshold[:, None]) & ~greedy[:, None]
        noisy = jnp.where(kept, logits / temperature[:, None] + noise, _NEG_INF)
        return jnp.where(greedy[:, None], logits, noisy)

    return first_largest(_if_any(~greedy, perturbed, lambda: logits, skip))


def first_largest(x: Float[Array, "R V"]) -> Int[Array, " R"]:
    """Argmax. In two passes, because XLA's own takes one value at a time on a CPU, and computes
    what it is fused with as slowly. A row with NaN gives some valid index.
    """
    last = x.shape[1] - 1
    index = jnp.arange(x.shape[1], dtype=jnp.int32)
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, last).min(axis=-1)


def thresholds_xla(
    x: Float[Array, "R V"],
    temperature: Float[Array, " R"],
    top_k: Int[Array, " R"],
    top_p: Float[Array, " R"],
    min_p: Float[Array, " R"],
    *,
    bits: int = 4,
    skip: bool = False,
) -> Float[Array, " R"]:
    """Least logit that min-p, then top-k, then top-p keep; logits that tie with it are all kept.

    Logits are compared as they come, which is the order of the scaled ones. Two that become equal
    only when the division by temperature rounds are no tie.
    """
    top = x.max(axis=-1)
    floor = top + jnp.where(min_p > 0, jnp.log(min_p), _NEG_INF) * temperature
    keys = _ordered(x)

    def search(enough: Callable[[UInt[Array, " R"]], Bool[Array, " R"]]) -> Float[Array, " R"]:
        return _unordered(_largest(enough, x.shape[0], bits))

    def by_k() -> Float[Array, " R"]:
        def enough(least: UInt[Array, " R"]) -> Bool[Array, " R"]:
            return jnp.sum(keys >= least[:, None], axis=-1, dtype=jnp.int32) >= top_k

        return jnp.where(top_k > 0, search(enough), _NEG_INF)

    found = _if_any(top_k > 0, by_k, lambda: jnp.full_like(top, _NEG_INF), skip)
    cut = jnp.maximum(found, floor)

    def by_p() -> Float[Array, " R"]:
        weights = jnp.where(
            x >= cut[:, None], jnp.exp((x - top[:, None]) / temperature[:, None]), 0.0
        )
        needed = top_p * weights.sum(axis=-1)

        def enough(least: UInt[Array, " R"]) -> Bool[Array, " R"]:
            return jnp.where(keys >= least[:, None], weights, 0.0).sum(axis=-1) >= needed

        return jnp.where(top_p < 1.0, jnp.maximum(search(enough), cut), cut)

    return _if_any(top_p < 1.0, by_p, lambda: cut, skip)


def _if_any(
    asked: Bool[Array, " R"], then: Callable[[], Array], otherwise: Callable[[], Array], skip: bool
) -> Array:
    """``then()``, which must give rows that did not ask what ``otherwise()`` gives them."""
    return lax.cond(asked.any(), then, otherwise) if skip else then()


def _ordered(x: Float[Array, "*S"]) -> UInt[Array, "*S"]:
    """uint32 keys that compare like the floats they come from."""
    pattern = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(pattern >= sign, ~pattern, pattern | sign)


def _unordered(key: UInt[Array, " R"]) -> Float[Array, " R"]:
    """The float of a key; keys below -inf's, which a search finds where all is enough, are -inf."""
    sign = jnp.uint32(0x80000000)
    pattern = jnp.where(key >= sign, key ^ sign, ~key)
    value = lax.bitcast_convert_type(pattern, jnp.float32)
    return jnp.where(key < jnp.uint32(0x007FFFFF), _NEG_INF, value)


def _largest(
    enough: Callable[[UInt[Array, " R"]], Bool[Array, " R"]], rows: int, bits: int
) -> UInt[Array, " R"]:
    """The largest key for which ``enough`` (monotone: true up to some key) still holds, per row."""
    if 32 % bits:
        raise ValueError(f"bits must divide 32, not {bits}")

    def digit(index: Int[Array, ""], found: UInt[Array, " R"]) -> UInt[Array, " R"]:
        shift = (32 - bits * (index + 1)).astype(jnp.uint32)
        tried = [found | (jnp.uint32(value) << shift) for value in range(1, 2**bits)]
        # Monotone: as many hold as the digit is large. Their sums fuse into one pass.
        value = sum(enough(key).astype(jnp.uint32) for key in tried)
        return found | (jnp.asarray(value, jnp.uint32) << shift)

    return lax.fori_loop(0, 32 // bits, digit, jnp.zeros((rows,), jnp.uint32))
