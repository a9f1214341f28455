"""Chunked-prefill attention over KV pages for Hopper (sm_90a), in Pallas Mosaic GPU.

The public function, what it refuses, and the launch. Each thread block has one producer
warpgroup and two consumers; their code is in prefill_sm90_producer.py and _consumer.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.prefill_sm90_consumer import consume
from pallas_kernels.attention.prefill_sm90_items import Gmem, PrefillOp, Shared
from pallas_kernels.attention.prefill_sm90_producer import produce
from pallas_kernels.attention.prefill_sm90_variant import prefill_operands
from pallas_kernels.attention.prefill_tiles import (
    ROWS,
    PrefillConfig,
    PrefillTiles,
    padded_tokens,
)
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_params import Params, param_arrays
from pallas_kernels.attention.widen_sm90 import multiplied
from pallas_kernels.kv_write.narrow import is_narrow

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
    if platform != "sm_90":
        return f"the prefill kernel is built for sm_90, not {platform}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"the prefill kernel takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if pages is not None and jnp.dtype(pages) != jnp.dtype(dtype) and not is_narrow(pages):
        return f"the prefill kernel takes pages of the queries' dtype or of bytes, not {pages}"
    if head_dim not in (64, 128):
        return f"the prefill kernel takes head dims 64 and 128, not {head_dim}"
    if page_size not in (8, 16, 32, 64, 128):
        return f"the prefill kernel takes pages of 8 to 128 tokens, a power of two, not {page_size}"
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads do not divide among {num_kv_heads} KV heads"
    return None


def default_prefill_config(num_heads: int, num_kv_heads: int) -> PrefillConfig:
    """Two heads per tile need an even number of query heads per KV head."""
    return PrefillConfig(heads_per_tile=1 if (num_heads // num_kv_heads) % 2 else 2)


def paged_prefill_sm90(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P 2 K B D"],
    block_tables: Int[Array, "R M"],
    tiles: PrefillTiles,
    *,
    scale: float,
    window: int | None = None,
    variant: AttentionVariant = CAUSAL,
    row_params: Params | None = None,
    config: PrefillConfig | None = None,
    interpret: Any = False,
) -> Float[Array, "T H D"]:
    """Causal attention of all tokens that ``tiles`` covers; the other tokens' output is zero.

    ``tiles`` must come from ``make_prefill_tiles`` with the same ``config`` and T. With ``window``
    a query sees itself and the ``window - 1`` tokens before it. ``row_params`` is what rows bring
    of the variant's params, see ``param_arrays``. ``scale`` must be positive. Raises
    ValueError for tile sizes that do not fit the shape.
    """
    config = config or default_prefill_config(q.shape[1], kv.shape[2])
    _check(q, kv, config, scale)
    tokens, answers = q.shape[0], q.dtype
    q = multiplied(q, kv.dtype)
    missing = padded_tokens(tokens, config) - tokens
    if missing:
        q = jnp.pad(q, ((0, missing), (0, 0), (0, 0)))
    params = param_arrays(variant, q.shape[1], block_tables.shape[0], row_params)
    op = PrefillOp(float(scale), window, variant, config)
    rest: dict[str, Any] = {"op": op, "answers": answers, "interpret": interpret}
    out = _launch(q, kv, block_tables, *tiles, params, **rest)
    return out[:tokens] if missing else out


def _check(q: Array, kv: Array, config: PrefillConfig, scale: float) -> None:
    (_, heads, dim), (_, _, kv_heads, page, _) = q.shape, kv.shape
    if config.block_kv % page:
        raise ValueError(f"block_kv {config.block_kv} is not a multiple of the page size {page}")
    if (heads // kv_heads) % config.heads_per_tile:
        raise ValueError(f"{heads // kv_heads} heads per KV head are odd: use heads_per_tile=1")
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    narrow = is_narrow(kv.dtype)
    rows = (4 if narrow else 6) * ROWS + (2 * config.stages + narrow) * config.block_kv
    if rows * dim * q.dtype.itemsize > _SHARED_BYTES:
        raise ValueError(f"{config} needs more shared memory than a thread block has")


@functools.partial(jax.jit, static_argnames=("op", "answers", "interpret"))
def _launch(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P 2 K B D"],
    block_tables: Int[Array, "R M"],
    table: Int[Array, "N F"],
    count: Int[Array, " 1"],
    params: Params,
    *,
    op: PrefillOp,
    answers: Any,
    interpret: Any,
) -> Float[Array, "T H D"]:
    """One jitted function for all layers, so that the kernel is lowered and compiled once."""
    kernel = plgpu.kernel(
        functools.partial(_body, op=op),
        out_type=jax.ShapeDtypeStruct(q.shape, answers),
        scratch_types=_scratch(q, kv, answers, op.config, bool(interpret)),
        grid=(op.config.num_ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    operands = prefill_operands(op.variant, params, table, op)
    return kernel(q, kv, block_tables, table, count, *operands)


def _scratch(
    q: Array, kv: Array, answers: Any, config: PrefillConfig, interpret: bool
) -> dict[str, Any]:
    """Shared memory and barriers of one thread block; the names are those of ``Shared``."""
    dim, dtype, page_size = q.shape[2], q.dtype, kv.shape[3]
    stages, pages, widens = config.stages, config.block_kv // page_size, is_narrow(kv.dtype)
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
        "o": None if widens else tile(2, ROWS, dim),
        "o_rows": plgpu.SMEM((2, ROWS, dim), answers),
        "q_full": plgpu.Barrier(num_arrivals=2),
        "q_free": plgpu.Barrier(num_arrivals=2),
        "k_full": plgpu.Barrier(num_arrivals=filled_by, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=filled_by, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_raw": None if widens else plgpu.Barrier(num_arrivals=pages),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    if widens:
        scratch["narrow"] = plgpu.SMEM((2, config.block_kv, dim), kv.dtype)
        scratch["narrow_full"] = plgpu.Barrier(num_arrivals=pages, num_barriers=2)
    if interpret:  # the interpreter has no wgmma with its left operand in registers
        scratch["p"] = tile(2, ROWS, config.block_kv)
    return {name: space for name, space in scratch.items() if space is not None}


def _body(*refs: Any, op: PrefillOp, **shared: Any) -> None:
    inputs, operands, out = refs[:5], refs[5:-1], refs[-1]
    params = len(op.variant.params)
    spans = operands[params] if op.ranged else None
    gmem = Gmem(*inputs, out=out, params=tuple(operands[:params]), spans=spans)
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
