"""Rotary embedding, optional qk-norm and KV write in one launch (Hopper, Pallas Mosaic GPU).

One thread block per token: its row of the fused projection goes from memory to registers and from
there to its places, without shared memory and without a barrier. The cache is a mutable reference,
so the launch aliases it and never copies it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.head_dims import HEAD_DIMS, padded_dim
from pallas_kernels.hopper import refuses_hopper
from pallas_kernels.kv_write.narrow import is_narrow, narrow

_WARPS, _LANES = 4, 32


@dataclasses.dataclass(frozen=True)
class KVWriteConfig:
    """``vector``: most channels one thread moves in one instruction."""

    vector: int = 8

    def __post_init__(self) -> None:
        if self.vector not in (1, 2, 4, 8):
            raise ValueError(f"vector must be 1, 2, 4 or 8, not {self.vector}")


@dataclasses.dataclass(frozen=True)
class _Shape:
    heads: int
    kv_heads: int
    half: int  # channels of half a head: the rotation pairs channel i with i + half
    stored: int  # channels of a head in the cache and in the answer; those past its own are zero
    pages: int
    eps: float | None  # None: no qk-norm
    config: KVWriteConfig

    @property
    def parts(self) -> "list[_Part]":
        return [
            _Part(size, (pl.ds(start, size), pl.ds(self.half + start, size)))
            for start, size in _powers(self.half)
        ]


class _Part(NamedTuple):
    """Channels that one array of registers holds, of the first half of a head and of the second."""

    size: int
    halves: tuple[Any, Any]


def refuses_kv_write_sm90(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    platform: str,
    *,
    pages: Any = None,
    rotated: int | None = None,
    interleaved: bool = False,
    qk_norm: bool = False,
) -> str | None:
    """None if the kernel takes the shape, else the reason. ``dtype`` is that of the projection,
    ``pages`` that of the cache; None: the same. ``rotated``: channels of each head that turn; None
    means all. Heads of other dims than HEAD_DIMS are written into ``padded_dim``."""
    if (reason := refuses_hopper("the KV write kernel", dtype, platform)) is not None:
        return reason
    pages = jnp.dtype(dtype if pages is None else pages)
    if pages != jnp.dtype(dtype) and not is_narrow(pages):
        return f"the KV write kernel takes pages of its input's dtype or of bytes, not {pages}"
    if padded_dim(head_dim) not in HEAD_DIMS:
        return f"the KV write kernel takes head dims {HEAD_DIMS} or padded to one, not {head_dim}"
    if qk_norm and head_dim not in HEAD_DIMS:
        return f"the KV write kernel norms heads of {HEAD_DIMS} channels, not {head_dim}"
    if (num_heads + 2 * num_kv_heads) * head_dim > 24_576:
        return f"{num_heads} + 2 x {num_kv_heads} heads of {head_dim} overflow the register file"
    if interleaved:
        return "the KV write kernel turns channels (i, i + D / 2), not interleaved pairs"
    if rotated not in (None, head_dim):
        return f"the KV write kernel turns whole heads, not {rotated} of {head_dim} channels"
    return None


@functools.partial(jax.jit, static_argnames=("eps", "config", "interpret"))
def rope_and_write_sm90(
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
    config: KVWriteConfig | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "T H W"], Float[Array, "P 2 K B W"]]:
    """Rotated (and normed) queries, and ``kv`` with the new keys and values; see ``api.py``.

    ``C = (H + 2 K) D`` and ``F = D / 2``: all channels turn, so F says how wide a head is. Donate
    ``kv``: it is updated in place.
    """
    tokens, dim, kv_heads = qkv.shape[0], 2 * cos.shape[1], kv.shape[2]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    shape = _Shape(
        heads,
        kv_heads,
        dim // 2,
        kv.shape[-1],
        kv.shape[0],
        None if q_norm is None else eps,
        config or KVWriteConfig(),
    )
    ref = jax.new_ref(kv)
    norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
    # The angles go in twice, for q and for k, whose register layouts differ: equal loads of one
    # reference would be merged into one, and no layout fits both uses.
    q = plgpu.kernel(
        functools.partial(_body, shape),
        out_type=jax.ShapeDtypeStruct((tokens, heads, shape.stored), qkv.dtype),
        grid=(tokens,),
        grid_names=("token",),
        # Nothing is read and written by one thread, and there is no shared memory.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(qkv.reshape(tokens, -1, dim), cos, sin, cos, sin, pages, offsets, *norms, ref)
    return q, jax.freeze(ref)


def _body(shape: _Shape, qkv_ref: Any, *refs: Any) -> None:
    q_angle_refs, k_angle_refs, (pages_ref, offsets_ref) = refs[:2], refs[2:4], refs[4:6]
    *norms, kv_ref, q_ref = refs[6:]
    token = lax.axis_index("token")
    page, offset = pages_ref[token], offsets_ref[token]
    heads, kv_heads = pl.ds(0, shape.heads), pl.ds(shape.heads, shape.kv_heads)
    value_heads = pl.ds(shape.heads + shape.kv_heads, shape.kv_heads)
    parts = shape.parts
    many = [_layout(shape, shape.heads, part.size) for part in parts]
    few = [_layout(shape, shape.kv_heads, part.size) for part in parts]

    def load(heads: Any, layouts: list[Any]) -> list[list[jax.Array]]:
        return [
            [_load(qkv_ref.at[token, heads, half], layout) for half in part.halves]
            for part, layout in zip(parts, layouts, strict=True)
        ]

    def load_angles(refs: tuple[Any, ...], layouts: list[Any]) -> list[list[jax.Array]]:
        return [
            [_load(ref.at[token, part.halves[0]], layout.reduce(0)) for ref in refs]
            for part, layout in zip(parts, layouts, strict=True)
        ]

    # Every load before the first store: the hardware then waits for memory once.
    q, k, v = load(heads, many), load(kv_heads, few), load(value_heads, few)
    q_angle, k_angle = load_angles(q_angle_refs, many), load_angles(k_angle_refs, few)
    if shape.eps is not None:  # then there is one part only
        q_norm_ref, k_norm_ref = norms
        halves = parts[0].halves
        q_norm = [_load(q_norm_ref.at[half], many[0].reduce(0)) for half in halves]
        q = [_normed(q[0], q_norm, shape.eps)]
        k_norm = [_load(k_norm_ref.at[half], few[0].reduce(0)) for half in halves]
        k = [_normed(k[0], k_norm, shape.eps)]
    for part, x, angle in zip(parts, q, q_angle, strict=True):
        for half, turned in zip(part.halves, _rotated(x, angle), strict=True):
            _store(q_ref.at[token, heads, half], turned)
    for channels, size in _padding(shape):
        _store(q_ref.at[token, heads, channels], _zeros(shape, shape.heads, size, q_ref.dtype))
    rotated_k = [_rotated(x, angle) for x, angle in zip(k, k_angle, strict=True)]

    @pl.when((page >= 0) & (page < shape.pages))
    def _() -> None:
        for part, keys, values in zip(parts, rotated_k, v, strict=True):
            for half, key, value in zip(part.halves, keys, values, strict=True):
                _store(kv_ref.at[page, 0, :, offset, half], narrow(key, kv_ref.dtype))
                _store(kv_ref.at[page, 1, :, offset, half], narrow(value, kv_ref.dtype))
        for channels, size in _padding(shape):
            zeros = _zeros(shape, shape.kv_heads, size, kv_ref.dtype)
            _store(kv_ref.at[page, 0, :, offset, channels], zeros)
            _store(kv_ref.at[page, 1, :, offset, channels], zeros)


def _powers(total: int) -> list[tuple[int, int]]:
    """Starts and sizes of stretches that fill ``total`` channels, each a power of two."""
    sizes = [1 << bit for bit in reversed(range(total.bit_length())) if total >> bit & 1]
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _padding(shape: _Shape) -> list[tuple[Any, int]]:
    own = 2 * shape.half
    return [(pl.ds(own + start, size), size) for start, size in _powers(shape.stored - own)]


def _zeros(shape: _Shape, rows: int, size: int, dtype: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, size), dtype), _layout(shape, rows, size))


def _load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _store(ref: Any, x: jax.Array) -> None:
    # From JAX 0.12 on, an assignment must fill whole cache lines; half a head of 64 fills half of
    # one. JAX 0.11 asks for nothing and has no other form.
    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = x
    else:
        store(ref, x, optimized=False)


def _rotated(x: list[jax.Array], angle: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Both halves of every head, turned in float32."""
    a, b = (half.astype(jnp.float32) for half in x)
    cos, sin = (_rows(part, a) for part in angle)
    return (a * cos - b * sin).astype(x[0].dtype), (b * cos + a * sin).astype(x[0].dtype)


def _normed(x: list[jax.Array], weight: list[jax.Array], eps: float) -> list[jax.Array]:
    """RMS norm of every head; rounds where the model's norm layer does."""
    dtype = x[0].dtype
    a, b = (half.astype(jnp.float32) for half in x)
    mean = (a * a + b * b).sum(axis=1) * (0.5 / a.shape[1])
    scale = lax.broadcast_in_dim(lax.rsqrt(mean + eps), a.shape, [0])
    return [
        ((half * scale).astype(dtype).astype(jnp.float32) * _rows(w.astype(jnp.float32), a)).astype(
            dtype
        )
        for half, w in zip((a, b), weight, strict=True)
    ]


def _rows(x: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(x, like.shape, [1])


def _layout(shape: _Shape, rows: int, half: int) -> Any:
    """Registers of a ``[rows, half]`` array: a row lies within one warp, so that a norm needs only
    shuffles; warps and lanes with no row of their own repeat another's work."""
    rows = min(rows & -rows, _WARPS * _LANES)  # the largest power of two that divides the rows
    vector = min(shape.config.vector, rows * half // (_WARPS * _LANES))
    vector = max(vector, half // _LANES, 1)
    lanes = half // vector
    per_warp = min(_LANES // lanes, rows)
    warps = max(1, min(_WARPS, rows // per_warp))
    tiles: list[tuple[int, ...]] = [(warps * per_warp, half)]
    if warps > 1 and per_warp > 1:
        tiles.append((per_warp, half))
    lane_dims: tuple[Any, ...] = (-3, -2) if per_warp > 1 else (-2,)
    if lanes * per_warp < _LANES:
        lane_dims += (plgpu.Replicated(_LANES // (lanes * per_warp)),)
    warp_dims: tuple[Any, ...] = ((-5 if per_warp > 1 else -3),) if warps > 1 else ()
    if warps < _WARPS:
        warp_dims += (plgpu.Replicated(_WARPS // warps),)
    return plgpu.Layout.TILED(plgpu.Tiling((*tiles, (vector,))), warp_dims, lane_dims, -1)
