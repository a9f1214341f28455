"""KV write as one XLA scatter; with a donated cache XLA updates it in place."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def kv_write(
    kv: Float[Array, "P 2 K B D"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"],
    pages: Int[Array, " T"],
    offsets: Int[Array, " T"],
) -> Float[Array, "P 2 K B D"]:
    """Puts token t at ``kv[pages[t], :, :, offsets[t]]``; a page of P or more drops the token."""
    update = jnp.stack([k, v], axis=1).astype(kv.dtype)  # [T, 2, K, D]
    return kv.at[pages, :, :, offsets].set(update, mode="drop")
