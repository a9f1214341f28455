"""How a layer's parameters and results are shared out: what layers declare, and how devices
exchange what they have computed. Tensor parallelism after Shoeybi et al. 2019, arXiv:1909.08053.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

AXIS = "tensor"  # of the mesh


class Cut(NamedTuple):
    """Metadata of an ``nnx.Param`` that every device has a part of. ``pieces``: lengths along
    ``axis`` of what lies one after the other in a device's part. A fused product has several, and
    each of them is cut, so that every device has some rows of all.
    """

    axis: int
    pieces: tuple[int, ...]


def parts(count: int, shards: int) -> int:
    """How many parts something of ``count`` entries is cut into: one where they do not come out
    even.
    """
    return shards if count % shards == 0 else 1


def first_own(count: int) -> Int[Array, ""]:
    """The first of the ``count`` entries that this device has, among those of all."""
    return lax.axis_index(AXIS) * count


def summed(x: Float[Array, "T E"], shards: int) -> Float[Array, "T E"]:
    """The sum of what all devices have, in ``x.dtype``, rounded once. E is a multiple of shards.

    An all-reduce adds in an order that may follow the size of its message, so that a token's bits
    would depend on its company. Of two numbers there is one order only. Of more, each device adds a
    share of the channels in the order of devices: as many bytes as an all-reduce moves.
    """
    if shards == 1:
        return x
    if shards == 2:
        return lax.psum(x, AXIS)
    count, width = x.shape
    sent = x.reshape(count, shards, width // shards)
    received = lax.all_to_all(sent, AXIS, split_axis=1, concat_axis=0)  # [shards, T, E / shards]
    total = received[0].astype(jnp.float32)
    for part in received[1:]:
        total = total + part.astype(jnp.float32)
    return lax.all_gather(total.astype(x.dtype), AXIS, axis=1, tiled=True)


def gathered(x: Float[Array, "N V"], shards: int) -> Float[Array, "N W"]:
    """The columns of all devices, side by side."""
    return x if shards == 1 else lax.all_gather(x, AXIS, axis=1, tiled=True)


def own_rows(x: Float[Array, "N ..."], pieces: tuple[int, ...]) -> Float[Array, "N ..."]:
    """This device's rows of several products, where devices hold the rows of all products one after
    the other. One collective: a CPU that plays many devices may hang in several at once.
    """
    whole, start, found = lax.all_gather(x, AXIS, axis=0, tiled=True), 0, list[Array]()
    for piece in pieces:
        found.append(lax.dynamic_slice_in_dim(whole, start + first_own(piece), piece))
        start += piece * lax.axis_size(AXIS)
    return jnp.concatenate(found)
