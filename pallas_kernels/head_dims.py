"""Which head dims the kernels have, and how a head of another dim is stored in one of them.

A padded head has zeros behind its own channels, in queries, keys and values alike: they add nothing
to a score, and what they give an answer is cut off.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

HEAD_DIMS = (64, 128, 256)
_ALIGN = 16  # rope turns half a head at a time, and eight channels move at once
_MOST = 1.6  # what a padded head may take of memory, beside one that is not


def padded_dim(head_dim: int) -> int:
    """Channels that a head has in KV pages; ``head_dim`` itself if none would serve it."""
    wider = next((dim for dim in HEAD_DIMS if dim >= head_dim), head_dim)
    return wider if head_dim % _ALIGN == 0 and wider <= _MOST * head_dim else head_dim


def pad_heads(x: Float[Array, "*S D"], dim: int) -> Float[Array, "*S W"]:
    """``x`` itself if it is ``dim`` wide already."""
    missing = dim - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def cut_heads(x: Float[Array, "*S W"], dim: int) -> Float[Array, "*S D"]:
    return x if x.shape[-1] == dim else x[..., :dim]
