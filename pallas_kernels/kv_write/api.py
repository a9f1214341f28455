"""Fused rope and KV write: the kernel where it takes the shape, plain XLA elsewhere."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.kv_write.kv_write_sm90 import (
    KVWriteConfig,
    refuses_kv_write_sm90,
    rope_and_write_sm90,
)
from pallas_kernels.kv_write.xla import rope_and_write_xla


def rope_and_write(
    qkv: Float[Array, "T C"],
    cos: Float[Array, "T F"],
    sin: Float[Array, "T F"],
    pages: Int[Array, " T"],
    offsets: Int[Array, " T"],
    kv: Float[Array, "P 2 K B W"],
    q_norm: Float[Array, " D"] | None = None,
    k_norm: Float[Array, " D"] | None = None,
    *,
    platform: str,
    eps: float = 1e-6,
    interleaved: bool = False,
    config: KVWriteConfig | None = None,
    head_dim: int | None = None,
) -> tuple[Float[Array, "T H W"], Float[Array, "P 2 K B W"]]:
    """Splits the fused projection, norms q and k if weights are given, turns them, writes k and v.

    ``C = (H + 2 K) D``: heads of q, then k, then v. D is ``head_dim``, by default W; where it is
    less, keys, values and the queries returned have zeros behind their own channels.
    ``cos`` and ``sin`` (float32) turn channel pairs (i, i + F), or (2 i, 2 i + 1) if
    ``interleaved``, in float32; channels from 2 F on pass through, and the result is rounded to
    ``qkv``'s dtype, then to that of the pages (``narrow``). Token t's k and v go to
    ``kv[pages[t], :, :, offsets[t]]``; a page that is none of the P drops the token. ``kv`` is
    updated in place where its buffer is donated. ``platform`` is ``"sm_90"`` for Hopper; every
    other value takes XLA. Raises ValueError if only one norm weight is given.
    """
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm go together: give both weights or neither")
    dim, kv_heads = head_dim or kv.shape[-1], kv.shape[2]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    facts = (heads, kv_heads, dim, qkv.dtype, platform)
    how: dict[str, Any] = {"interleaved": interleaved, "qk_norm": q_norm is not None}
    reason = refuses_kv_write_sm90(*facts, pages=kv.dtype, rotated=2 * cos.shape[1], **how)
    args = (qkv, cos, sin, pages, offsets, kv, q_norm, k_norm)
    if reason is None:
        return rope_and_write_sm90(*args, eps=eps, config=config)
    return rope_and_write_xla(*args, eps=eps, interleaved=interleaved, head_dim=head_dim)
