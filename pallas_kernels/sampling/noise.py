"""Gumbel noise as a pure function of (seed, position, token), the same in every form of the op.

Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
bit for bit what ``jax.random.gumbel(jax.random.fold_in(key(seed), position))`` draws. Written in
operations that a kernel can use on its registers.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_TINY = 1.1754944e-38  # the least uniform number, so that no logarithm of zero is taken


def row_keys(seed: Int[Array, "R 2"], position: Int[Array, " R"]) -> UInt[Array, "R 2"]:
    """One key per row, from the two words of its seed and the position of the token to draw."""
    words = seed.astype(jnp.uint32)
    folded = threefry(
        words[:, 0], words[:, 1], jnp.zeros(position.shape, jnp.uint32), position.astype(jnp.uint32)
    )
    return jnp.stack(folded, axis=1)


def gumbel(key0: Array, key1: Array, token: UInt[Array, "*S"]) -> Float[Array, "*S"]:
    """Gumbel(0, 1) noise of ``token`` under a row's key."""
    high, low = threefry(key0, key1, jnp.zeros_like(token), token)
    mantissa = lax.shift_right_logical(high ^ low, jnp.full_like(token, 9))
    uniform = lax.bitcast_convert_type(mantissa | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform, _TINY)))


def threefry(key0: Array, key1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """The block cipher: key words broadcast against the two counter words (all uint32)."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ _rotate(x1, distance)
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + (keys[(group + 2) % 3] + jnp.uint32(group + 1))
    return x0, x1


def _rotate(x: Array, distance: int) -> Array:
    left = lax.shift_left(x, jnp.full_like(x, distance))
    return left | lax.shift_right_logical(x, jnp.full_like(x, 32 - distance))
