"""KV write as one XLA scatter; with a donated cache XLA updates it in place."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.head_dims import pad_heads
from pallas_kernels.kv_write.narrow import narrow


def kv_write(
    kv: Float[Array, "P S K B W"],
    k: Float[Array, "T K D"],
    v: Float[Array, "T K D"] | None,
    pages: Int[Array, " T"],
    offsets: Int[Array, " T"],
) -> Float[Array, "P S K B W"]:
    """Puts token t at ``kv[pages[t], :, :, offsets[t]]``, and zeros behind it where pages hold
    wider heads; a page of P or more drops the token. S is 2, or 1 where there are no values."""
    update = narrow(jnp.stack([k] if v is None else [k, v], axis=1), kv.dtype)
    update = pad_heads(update, kv.shape[-1])  # [T, S, K, W]
    return kv.at[pages, :, :, offsets].set(update, mode="drop")


def rope_and_write_xla(
    qkv: Float[Array, "T C"],
    cos: Float[Array, "T F"],
    sin: Float[Array, "T F"],
    pages: Int[Array, " T"],
    offsets: Int[Array, " T"],
    kv: Float[Array, "P 2 K B W"],
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = False,
    head_dim: int | None = None,
) -> tuple[Float[Array, "T H W"], Float[Array, "P 2 K B W"]]:
    """``rope_and_write_reference`` with results in the dtypes of ``qkv`` and ``kv``."""
    dim, kv_heads = head_dim or kv.shape[-1], kv.shape[2]
    parts = qkv.reshape(qkv.shape[0], -1, dim)
    heads = parts.shape[1] - 2 * kv_heads
    q, k, v = jnp.split(parts, [heads, heads + kv_heads], axis=1)
    if q_norm is not None and k_norm is not None:
        q, k = _norm(q, q_norm, eps), _norm(k, k_norm, eps)
    q, k = (rotate(x, cos, sin, interleaved=interleaved) for x in (q, k))
    pages = jnp.where(pages < 0, kv.shape[0], pages)  # a negative index would count from the end
    return pad_heads(q, kv.shape[-1]), kv_write(kv, k, v, pages, offsets)


def rotate(
    x: Float[Array, "T N D"],
    cos: Float[Array, "T F"],
    sin: Float[Array, "T F"],
    *,
    interleaved: bool = False,
) -> Float[Array, "T N D"]:
    """The first ``2 F`` channels of every head turned in float32; the rest passes through.

    Channel i turns with i + F, or 2 i with 2 i + 1 if ``interleaved``.
    """
    width = 2 * cos.shape[1]
    turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = jnp.split(turned, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        out = jnp.stack([a, b], axis=-1).reshape(turned.shape)
    else:
        out = jnp.concatenate([a, b], axis=-1)
    return jnp.concatenate([out.astype(x.dtype), rest], axis=-1)


def _norm(x: Float[Array, "T N D"], weight: Float[Array, " D"], eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight[None, None]
