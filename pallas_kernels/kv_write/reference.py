"""The contract of the fused rope and KV write, as the shortest float32 program that is right."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.kv_write.narrow import widened


def rope_and_write_reference(
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
    """Heads of q, then k, then v: q and k are RMS-normed if weights are given and their channel
    pairs (i, i + F), or (2 i, 2 i + 1) if ``interleaved``, turned by the token's angles; channels
    from 2 F on pass through. Token t's k and v replace ``kv[pages[t], :, :, offsets[t]]``, or
    nothing if the page is none of the P.

    ``C = (H + 2 K) D``, ``F <= D / 2``, and D is ``head_dim`` (None: W); channels from D to W are
    zero. Both results are float32, rounded nowhere.
    """
    tokens, dim, kv_heads = qkv.shape[0], head_dim or kv.shape[-1], kv.shape[2]
    parts = qkv.astype(jnp.float32).reshape(tokens, -1, dim)
    heads = parts.shape[1] - 2 * kv_heads
    q, k, v = jnp.split(parts, [heads, heads + kv_heads], axis=1)
    if q_norm is not None and k_norm is not None:
        q, k = _norm(q, q_norm, eps), _norm(k, k_norm, eps)
    turn = lax.complex(cos, sin)[:, None]
    q, k = _turn(q, turn, interleaved), _turn(k, turn, interleaved)
    out = widened(kv, jnp.float32)
    pages = jnp.where(pages < 0, kv.shape[0], pages)
    q, k, v = (jnp.zeros((*x.shape[:2], kv.shape[-1])).at[..., :dim].set(x) for x in (q, k, v))
    return q, out.at[pages, :, :, offsets].set(jnp.stack([k, v], axis=1), mode="drop")


def _norm(x: Float[Array, "T N D"], weight: Float[Array, " D"], eps: float) -> Array:
    scale = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * scale * weight.astype(jnp.float32)[None, None]


def _turn(x: Float[Array, "T N D"], turn: Array, interleaved: bool) -> Float[Array, "T N D"]:
    half = turn.shape[-1]
    step = 2 if interleaved else 1
    first = slice(0, step * half, step)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    z = lax.complex(x[..., first], x[..., second]) * turn
    return x.at[..., first].set(z.real).at[..., second].set(z.imag)
