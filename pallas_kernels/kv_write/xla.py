"""KV write as one XLA scatter; with a donated cache XLA updates it in place."""

import jax.numpy as jnp
from jax import lax
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


def rope_and_write_xla(
    qkv: Float[Array, "T C"],
    cos: Float[Array, "T F"],
    sin: Float[Array, "T F"],
    pages: Int[Array, " T"],
    offsets: Int[Array, " T"],
    kv: Float[Array, "P 2 K B D"],
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Float[Array, "T H D"], Float[Array, "P 2 K B D"]]:
    """``rope_and_write_reference`` with results in the dtypes of ``qkv`` and ``kv``."""
    dim, kv_heads = kv.shape[-1], kv.shape[2]
    parts = qkv.reshape(qkv.shape[0], -1, dim)
    heads = parts.shape[1] - 2 * kv_heads
    q, k, v = jnp.split(parts, [heads, heads + kv_heads], axis=1)
    if q_norm is not None and k_norm is not None:
        q, k = _norm(q, q_norm, eps), _norm(k, k_norm, eps)
    q, k = _rotate(q, cos[:, None], sin[:, None]), _rotate(k, cos[:, None], sin[:, None])
    pages = jnp.where(pages < 0, kv.shape[0], pages)  # a negative index would count from the end
    return q, kv_write(kv, k, v, pages, offsets)


def _norm(x: Float[Array, "T N D"], weight: Float[Array, " D"], eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight[None, None]


def _rotate(x: Float[Array, "T N D"], cos: Array, sin: Array) -> Float[Array, "T N D"]:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
