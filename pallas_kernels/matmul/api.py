"""Products of few rows with a weight: the kernel where it takes the shape, XLA elsewhere."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.matmul.skinny_config import default_skinny_config, refuses_skinny_sm90
from pallas_kernels.matmul.skinny_sm90 import skinny_matmul_sm90
from pallas_kernels.matmul.xla import gated_matmul_xla, skinny_matmul_xla


def refuses_skinny_matmul(
    x: jax.ShapeDtypeStruct | jax.Array,
    w: jax.ShapeDtypeStruct | jax.Array,
    *,
    platform: str,
    gated: bool = False,
    out_dtype: Any = None,
) -> str | None:
    """None if the kernel multiplies them, else the reason."""
    if x.dtype != w.dtype:
        return f"the skinny product takes one dtype, not {x.dtype} and {w.dtype}"
    (rows, k), n = x.shape, w.shape[0]
    config = default_skinny_config(n, k, gated=gated)
    out_dtype = out_dtype or x.dtype
    return refuses_skinny_sm90(rows, n, k, x.dtype, out_dtype, platform, config, gated=gated)


def skinny_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "N K"],
    *,
    platform: str,
    gated: bool = False,
    out_dtype: Any = None,
) -> Float[Array, "M N"]:
    """``x @ w.T``, summed in float32 and rounded once to ``out_dtype`` (by default ``x``'s).

    ``gated``: the first half of ``w`` are gate rows, the other half their up rows, and the result
    is ``silu(gate) * up``, half as wide; gate and up are rounded to ``x``'s dtype first. From the
    kernel the bits of a row do not depend on how many rows there are. ``platform`` is ``"sm_90"``
    for Hopper; every other value takes XLA.
    """
    reason = refuses_skinny_matmul(x, w, platform=platform, gated=gated, out_dtype=out_dtype)
    if reason is None:
        return skinny_matmul_sm90(x, w, gated=gated, out_dtype=out_dtype)
    if gated:
        y = gated_matmul_xla(x, w)
        return y if out_dtype is None else y.astype(out_dtype)
    return skinny_matmul_xla(x, w, out_dtype=out_dtype or x.dtype)
