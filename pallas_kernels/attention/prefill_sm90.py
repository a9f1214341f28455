"""Chunked-prefill attention over KV pages for Hopper (sm_90a), in Pallas Mosaic GPU.

The public function, what it refuses, and the launch. Each thread block has one producer
warpgroup and two consumers, in files of their own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.decode_config import refuses_numbers
from pallas_kernels.attention.page_map import PageMap, prefill_map
from pallas_kernels.attention.prefill_sm90_consumer import consume
from pallas_kernels.attention.prefill_sm90_items import Gmem, PrefillOp, Shared
from pallas_kernels.attention.prefill_sm90_operands import prefill_operands
from pallas_kernels.attention.prefill_sm90_producer import produce
from pallas_kernels.attention.prefill_tiles import (
    ROWS,
    PrefillConfig,
    PrefillTiles,
    columns_at_once,
    padded_tokens,
)
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_params import Params, TokenValues, param_arrays
from pallas_kernels.attention.widen_sm90 import multiplied
from pallas_kernels.attention.xla_spans import Sight
from pallas_kernels.head_dims import HEAD_DIMS, cut_heads, pad_heads
from pallas_kernels.hopper import refuses_hopper
from pallas_kernels.kv_write.narrow import FP8, is_narrow

_PRODUCER = 2  # warpgroup; 0 and 1 consume
_SHARED_BYTES = 232_448 - 1024  # per thread block, less what barriers take


def refuses_prefill_sm90(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: Any,
    platform: str,
    pages: Any = None,
) -> str | None:
    """None if the kernel takes the shape, else the reason. ``dtype`` is that of queries, ``pages``
    that of the cache; None: the same."""
    if (reason := refuses_hopper("the prefill kernel", dtype, platform)) is not None:
        return reason
    if pages is not None and jnp.dtype(pages) != jnp.dtype(dtype) and not is_narrow(pages):
        return f"the prefill kernel takes pages of the queries' dtype or of bytes, not {pages}"
    if head_dim not in HEAD_DIMS:
        return f"the prefill kernel takes head dims {HEAD_DIMS}, not {head_dim}"
    if pages is not None and is_narrow(pages) and head_dim > 128:
        return f"the prefill kernel takes bytes in heads of up to 128 channels, not {head_dim}"
    if page_size not in (8, 16, 32, 64, 128):
        return f"the prefill kernel takes pages of 8 to 128 tokens, a power of two, not {page_size}"
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads do not divide among {num_kv_heads} KV heads"
    return None


def default_prefill_config(num_heads: int, num_kv_heads: int, head_dim: int = 128) -> PrefillConfig:
    """Two heads per tile need an even number of query heads per KV head. 64 queries of 256 channels
    take 128 of a consumer's 232 registers, scores of 64 keys 32: those of 128 would not fit."""
    heads_per_tile = 1 if (num_heads // num_kv_heads) % 2 else 2
    return PrefillConfig(heads_per_tile, block_kv=128 if head_dim <= 128 else 64)


def paged_prefill_sm90(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P 2 K B W"],
    block_tables: Int[Array, "R M"],
    tiles: PrefillTiles,
    out: Float[Array, "T H D"],
    *,
    scale: float,
    window: int | None = None,
    variant: AttentionVariant = CAUSAL,
    row_params: Params | None = None,
    tokens: TokenValues | None = None,
    page_map: PageMap | None = None,
    config: PrefillConfig | None = None,
    interpret: Any = False,
) -> Float[Array, "T H D"]:
    """``out`` with causal attention in the rows of all tokens that ``tiles`` covers, and zeros in
    those of padding.

    It is written in place where the caller has no other use for ``out``, so the answers of decode
    rows may be in it already, at no cost. ``tiles`` must come from ``make_prefill_tiles`` with the
    same ``config`` and T. With ``window`` a query sees itself and the ``window - 1`` tokens before
    it. ``row_params`` is what rows bring of the variant's params, see ``param_arrays``, ``tokens``
    its per_token params. ``page_map`` is ``prefill_map`` of a mapped variant, or made here.
    ``scale`` must be positive. Pages may hold wider heads than the queries, with zeros behind.
    Raises ValueError for tile sizes that do not fit the shape.
    """
    own_dim = q.shape[2]
    q, out = pad_heads(q, kv.shape[4]), pad_heads(out, kv.shape[4])
    config = config or default_prefill_config(q.shape[1], kv.shape[2], q.shape[2])
    _check(q, kv, config, scale, len(variant.token_params))
    total = q.shape[0]
    q = multiplied(q, kv.dtype)
    missing = padded_tokens(total, config) - total
    if missing:
        q, out = (jnp.pad(x, ((0, missing), (0, 0), (0, 0))) for x in (q, out))
        if tokens is not None:
            queries = jnp.pad(tokens.queries, ((0, missing), (0, 0), (0, 0)))
            tokens = tokens._replace(queries=queries)
    if variant.is_mapped and page_map is None:
        sight = Sight(window, variant, row_params, kv.shape[3], block_tables.shape)
        page_map = prefill_map(tiles, q.shape[1], sight, config)
    params = param_arrays(variant, q.shape[1], block_tables.shape[0], row_params)
    op = PrefillOp(float(scale), window, variant, config)
    more = (params, page_map, tokens, out)
    out = _launch(q, kv, block_tables, *tiles, *more, op=op, interpret=interpret)
    return cut_heads(out[:total] if missing else out, own_dim)


def _check(q: Array, kv: Array, config: PrefillConfig, scale: float, numbers: int) -> None:
    (_, heads, dim), (_, _, kv_heads, page, _) = q.shape, kv.shape
    if config.block_kv % page and page % config.block_kv:
        raise ValueError(f"block_kv {config.block_kv} and page size {page}: neither divides")
    if (heads // kv_heads) % config.heads_per_tile:
        raise ValueError(f"{heads // kv_heads} heads per KV head are odd: use heads_per_tile=1")
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if reason := refuses_numbers(numbers, page, FP8 if is_narrow(kv.dtype) else str(kv.dtype)):
        raise ValueError(reason)
    needed = config.smem_bytes(dim, widens=is_narrow(kv.dtype), numbers=numbers)
    if needed > _SHARED_BYTES:
        raise ValueError(f"{config} needs more shared memory than a thread block has")


@functools.partial(jax.jit, static_argnames=("op", "interpret"))
def _launch(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P 2 K B D"],
    block_tables: Int[Array, "R M"],
    table: Int[Array, "N F"],
    count: Int[Array, " 1"],
    params: Params,
    page_map: PageMap | None,
    tokens: TokenValues | None,
    out: Float[Array, "T H D"],
    *,
    op: PrefillOp,
    interpret: Any,
) -> Float[Array, "T H D"]:
    """One jitted function for all layers, so that the kernel is lowered and compiled once."""
    compiler_params = plgpu.CompilerParams(approx_math=True)
    if op.variant.token_params:  # they need what is kept for sums across warps; there are none here
        compiler_params = dataclasses.replace(compiler_params, reduction_scratch_bytes=0)
    kernel = plgpu.kernel(
        functools.partial(_body, op=op),
        out_type=(),
        scratch_types=_scratch(q, kv, out.dtype, op, bool(interpret)),
        grid=(op.config.num_ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        compiler_params=compiler_params,
        interpret=interpret,
    )
    operands = prefill_operands(op.variant, params, table, op, page_map, tokens)
    written = jax.new_ref(out)
    kernel(q, kv, block_tables, table, count, *operands, written)
    return jax.freeze(written)


def _scratch(q: Array, kv: Array, answers: Any, op: PrefillOp, interpret: bool) -> dict[str, Any]:
    """Shared memory and barriers of one thread block; the names are those of ``Shared``."""
    config, numbers = op.config, len(op.variant.token_params)
    dim, dtype, page_size = q.shape[2], q.dtype, kv.shape[3]
    stages, pages = config.stages, max(config.block_kv // page_size, 1)
    columns, widens = columns_at_once(dim), is_narrow(kv.dtype)
    filled_by = 1 if widens else pages
    tiling: Any = plgpu.TilingTransform  # its base class is abstract to a type checker only
    swizzle: Any = plgpu.SwizzleTransform
    swizzled = (tiling((8, 64)), swizzle(128))

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=swizzled)

    scratch: dict[str, Any] = {
        "q": tile(2, ROWS, dim),
        "k": tile(stages, config.block_kv, dim),
        "v": tile(stages, config.block_kv, dim),
        "o": None if widens else tile(2, ROWS, columns),
        "o_rows": plgpu.SMEM((2, ROWS, columns), answers),
        "q_full": plgpu.Barrier(num_arrivals=2),
        "q_free": plgpu.Barrier(num_arrivals=2),
        "k_full": plgpu.Barrier(num_arrivals=filled_by * (1 + numbers), num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=filled_by, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_raw": None if widens else plgpu.Barrier(num_arrivals=pages),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    if widens:
        scratch["narrow"] = plgpu.SMEM((2, config.block_kv, dim), kv.dtype)
        scratch["narrow_full"] = plgpu.Barrier(num_arrivals=pages, num_barriers=2)
    if numbers:
        sizes = (stages, numbers, config.block_kv)
        scratch["numbers"] = plgpu.SMEM(sizes, jnp.float32)
    if interpret:  # the interpreter has no wgmma with its left operand in registers
        scratch["p"] = tile(2, ROWS, config.block_kv)
    return {name: space for name, space in scratch.items() if space is not None}


def _body(*refs: Any, op: PrefillOp, **shared: Any) -> None:
    inputs, operands, out = refs[:5], refs[5:-1], refs[-1]
    rest = list(operands)
    params = tuple(rest.pop(0) for _ in op.variant.array_params)
    more: dict[str, Any] = {}
    if op.ranged:
        more["spans"] = rest.pop(0)
    if op.variant.is_mapped:
        more |= {"order": rest.pop(0), "counts": rest.pop(0)}
    if op.variant.token_params:
        more |= {"token_pages": rest.pop(0), "token_queries": rest.pop(0)}
    gmem = Gmem(*inputs, out=out, params=params, **more)
    smem = Shared(**shared)
    warpgroup, config = lax.axis_index("wg"), op.config

    @pl.when(warpgroup == _PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(config.producer_registers, action="decrease")
        produce(gmem, smem, op)

    @pl.when(warpgroup != _PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(config.consumer_registers, action="increase")
        consume(gmem, smem, op, warpgroup)
