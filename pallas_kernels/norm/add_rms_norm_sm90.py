"""Residual add and RMS norm in one launch (Hopper, Pallas Mosaic GPU).

A row is held in the registers of one warpgroup from its only read to its only write; shared memory
carries nothing but the four warps' shares of the sum of squares.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import refuses_hopper

_WARPS, _LANES = 4, 32
_MOST_CHANNELS = 64  # of a row that one thread holds: more would not fit in its registers


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """``rows`` of one thread block, which share one read of the weight. Changes no bits."""

    rows: int = 1

    def __post_init__(self) -> None:
        if self.rows not in (1, 2, 4):
            raise ValueError(f"rows must be 1, 2 or 4, not {self.rows}")


def default_norm_config(tokens: int, width: int) -> NormConfig:
    """Few tokens are spread over all of the device; of many, a thread block takes two, as long as
    registers are left for several blocks on a processor."""
    return NormConfig(rows=2 if tokens >= 1024 and width <= 4096 else 1)


def refuses_add_rms_norm_sm90(width: int, dtype: Any, platform: str) -> str | None:
    """None if the kernel takes rows of ``width`` channels, else the reason."""
    if (reason := refuses_hopper("the norm kernel", dtype, platform)) is not None:
        return reason
    if width % (2 * _LANES):
        return f"the norm kernel takes a multiple of {2 * _LANES} channels, not {width}"
    warps, _ = _split(width)
    if width > warps * _LANES * _MOST_CHANNELS:
        return f"{width} channels over {warps} warps overflow the register file"
    return None


@functools.partial(jax.jit, static_argnames=("eps", "config", "interpret"))
def add_rms_norm_sm90(
    x: Float[Array, "T N"],
    branch: Float[Array, "T N"],
    weight: Float[Array, " N"],
    *,
    eps: float,
    config: NormConfig | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
    """The norm of ``x + branch``, and the sum; see ``api.py``."""
    tokens = x.shape[0]
    config = config or default_norm_config(*x.shape)
    rows = config.rows if tokens % config.rows == 0 else 1
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    normed, total = plgpu.kernel(
        functools.partial(_body, rows, eps),
        out_type=(out, out),
        grid=(tokens // rows,),
        grid_names=("block",),
        # No memory is both read and written; the sum over warps brings its own barriers.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(x, branch, weight)
    return normed, total


def _body(rows: int, eps: float, *refs: Any) -> None:
    x_ref, branch_ref, weight_ref, normed_ref, total_ref = refs
    width, dtype = x_ref.shape[1], x_ref.dtype
    load = functools.partial(plgpu.load, layout=_layout(width), optimized=False)
    own = [lax.axis_index("block") * rows + row for row in range(rows)]

    # Every load before the first store: the hardware then waits for memory once.
    parts = [(load(x_ref.at[row]), load(branch_ref.at[row])) for row in own]
    weight = load(weight_ref)
    for row, (x, branch) in zip(own, parts, strict=True):
        total = x + branch
        _store(total_ref.at[row], total)
        total32 = total.astype(jnp.float32)
        scale = lax.rsqrt(jnp.sum(total32 * total32, axis=0) / width + eps)
        # Rounds where the XLA form does.
        normed = (total32 * scale).astype(dtype).astype(jnp.float32)
        _store(normed_ref.at[row], (normed * weight.astype(jnp.float32)).astype(dtype))


def _store(ref: Any, x: jax.Array) -> None:
    # From JAX 0.12 on this is the form that writes less than whole cache lines; 0.11 has no other
    # than the assignment.
    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = x
    else:
        store(ref, x, optimized=False)


def _layout(width: int) -> Any:
    """A row over the threads: contiguous vectors, one thread's next to another's."""
    warps, vector = _split(width)
    if warps == 1:  # all four load, compute and store the same
        tiling = plgpu.Tiling(((_LANES * vector,), (vector,)))
        return plgpu.Layout.TILED(tiling, (plgpu.Replicated(_WARPS),), (-2,), -1)
    tiling = plgpu.Tiling(((warps * _LANES * vector,), (_LANES * vector,), (vector,)))
    return plgpu.Layout.TILED(tiling, (-3,), (-2,), -1)


def _split(width: int) -> tuple[int, int]:
    """Warps that share a row, and channels that a thread moves in one instruction."""
    for warps in (_WARPS, 1):
        for vector in (8, 4, 2):
            if width % (warps * _LANES * vector) == 0:
                return warps, vector
    raise ValueError(f"no whole number of vectors per lane in {width} channels")
