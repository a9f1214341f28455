"""Pages of eight bits for the Hopper kernels: float16 in shared memory, which a wgmma can multiply.

Every float8_e4m3fn is a float16, and Hopper turns two into two by one instruction; bfloat16 would
take three more. It has no wgmma with keys in eight bits beside queries in sixteen.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.decode_sm90_sums import Ref
from pallas_kernels.kv_write.narrow import is_narrow, widened

_WIDE = jnp.float16
_WARPS, _LANES, _VECTOR = 4, 32, 8  # a lane reads eight bytes and writes sixteen


def multiplied(q: Float[Array, "*N D"], pages: Any) -> Float[Array, "*N D"]:
    """The queries as they are multiplied with keys of that dtype. No real one is beyond float16."""
    if not is_narrow(pages):
        return q
    largest = float(jnp.finfo(_WIDE).max)
    return jnp.clip(q.astype(jnp.float32), -largest, largest).astype(_WIDE)


def widen(narrow: Ref, wide: Ref, *, rows: int = 64, written: Any = None) -> None:
    """Copies tokens [N, D] from plain into swizzled shared memory, ``rows`` at a time: what a
    thread holds of them is ``rows * D / 128`` numbers twice. With ``written`` the tokens from there
    on become zero. A commit_smem must follow, before ``wide`` is multiplied and before ``narrow``
    is filled again.
    """
    tokens, dim = wide.shape
    layout = _layout(dim)

    def one_part(index: Array | int) -> None:
        row = index * rows
        part = pl.ds(row, rows)
        loaded = widened(plgpu.load(narrow.at[part], layout=layout), wide.dtype)
        if written is not None:
            token = plgpu.broadcasted_iota(jnp.int32, loaded.shape, 0, layout=layout)
            loaded = jnp.where(token < written - row, loaded, jnp.zeros_like(loaded))
        wide.at[part][...] = loaded

    if tokens == rows:
        one_part(0)
    else:  # unrolled, it could take more registers than there are
        pl.loop(0, tokens // rows)(one_part)


def _layout(dim: int) -> Any:
    """Registers of an ``[N, dim]`` array whose rows lie one after the other in the lanes."""
    lanes = dim // _VECTOR
    of_warp = _LANES // lanes
    tiles = ((_WARPS * of_warp, dim), (of_warp, dim), (_VECTOR,))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-5,), (-3, -2), -1)
