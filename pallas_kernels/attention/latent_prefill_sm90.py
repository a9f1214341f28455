"""Chunked prefill over latents for Hopper (sm_90a), in Pallas Mosaic GPU: the public function, what
it refuses, and the launch. Of the four warpgroups of a thread block one fetches, one makes weights
and two sum values; their code is in latent_prefill_sm90_producer.py and _consumers.py.

All query heads of a token attend the same keys, so a tile is 64 rows of (token, head): of 16 heads
four tokens, of 128 half a token. The latents are attended as they are in the pages, with queries of
as many channels (DeepSeek-V2, arXiv:2405.04434, absorbed), and read once for scores and answers.
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

from pallas_kernels.attention.decode_config import PAGE_SIZES, refuses_latents
from pallas_kernels.attention.latent_prefill_sm90_consumers import add, score
from pallas_kernels.attention.latent_prefill_sm90_items import (
    BLOCK,
    STAGES,
    Gmem,
    LatentOp,
    Shared,
)
from pallas_kernels.attention.latent_prefill_sm90_producer import produce
from pallas_kernels.attention.prefill_tiles import (
    ALIGN,
    ROWS,
    PrefillConfig,
    PrefillTiles,
    make_prefill_tiles,
    padded_tokens,
)
from pallas_kernels.hopper import refuses_hopper
from pallas_kernels.kv_write.narrow import FP8, is_narrow

# Warpgroups 0 and 1 sum values.
_SCORES, _PRODUCER = 2, 3
_SUM_REGISTERS, _SCORE_REGISTERS, _PRODUCER_REGISTERS = 168, 136, 40  # 2 + 1 + 1 of them: 512
_NUM_CTAS = 132
LATENT_TILES = PrefillConfig(block_kv=BLOCK)  # of ROWS rows of (token, head)


def refuses_latent_prefill_sm90(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    page_size: int,
    dtype: Any,
    platform: str,
    pages: Any = None,
) -> str | None:
    """None if the kernel takes the shape, else the reason. ``dtype`` is that of queries, ``pages``
    that of the cache; None: the same."""
    if (reason := refuses_hopper("the prefill kernel", dtype, platform)) is not None:
        return reason
    pages = jnp.dtype(dtype) if pages is None else jnp.dtype(pages)
    reason = refuses_latents(
        num_kv_heads, head_dim, value_dim, FP8 if is_narrow(pages) else str(pages), numbers=0
    )
    if reason is not None:
        return reason
    if pages != jnp.dtype(dtype):
        return f"the prefill kernel takes pages of the queries' dtype, not {pages}"
    if page_size not in PAGE_SIZES:
        return f"the prefill kernel takes page sizes {PAGE_SIZES}, not {page_size}"
    if num_heads % ALIGN:
        return f"the prefill kernel takes latents with a multiple of 8 query heads, not {num_heads}"
    return None


def make_latent_tiles(
    query_start_loc: Int[Array, " R1"],
    seq_lens: Int[Array, " R"],
    num_decode_rows: Int[Array, ""],
    num_tokens: int,
    num_heads: int,
) -> PrefillTiles:
    """Tiles of (token, head) rows of one slot each, of all slots from ``num_decode_rows`` on. Every
    number in them counts rows."""
    starts, lens = query_start_loc * num_heads, seq_lens * num_heads
    return make_prefill_tiles(starts, lens, num_decode_rows, num_tokens * num_heads, LATENT_TILES)


def paged_latent_prefill_sm90(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P 1 1 B D"],
    block_tables: Int[Array, "R M"],
    tiles: PrefillTiles,
    out: Float[Array, "T H V"],
    *,
    scale: float,
    num_ctas: int = _NUM_CTAS,
    interpret: Any = False,
) -> Float[Array, "T H V"]:
    """``out`` with causal attention in the rows of all tokens that ``tiles`` (make_latent_tiles)
    covers, and zeros in those of padding. The first V channels of a key are its value.

    It is written in place where the caller has no other use for ``out``, so the answers of decode
    rows may be in it already, at no cost. ``scale`` must be positive. For what
    ``refuses_latent_prefill_sm90`` takes.
    """
    tokens, heads, _ = out.shape
    rows = [x.reshape(tokens * heads, -1) for x in (q, out)]
    missing = padded_tokens(tokens * heads, LATENT_TILES) - tokens * heads
    if missing:
        rows = [jnp.pad(x, ((0, missing), (0, 0))) for x in rows]
    op = LatentOp(float(scale), heads, num_ctas, bool(interpret))
    answers = _launch(rows[0], kv, block_tables, *tiles, rows[1], op=op, interpret=interpret)
    return answers[: tokens * heads].reshape(out.shape)


@functools.partial(jax.jit, static_argnames=("op", "interpret"))
def _launch(
    q: Float[Array, "N D"],
    kv: Float[Array, "P 1 1 B D"],
    block_tables: Int[Array, "R M"],
    table: Int[Array, "N F"],
    count: Int[Array, " 1"],
    out: Float[Array, "N V"],
    *,
    op: LatentOp,
    interpret: Any,
) -> Float[Array, "N V"]:
    """One jitted function for all layers, so that the kernel is lowered and compiled once."""
    compiler_params = dataclasses.replace(
        plgpu.CompilerParams(approx_math=True),
        reduction_scratch_bytes=0,  # for sums across warps: there are none, and no room
    )
    kernel = plgpu.kernel(
        functools.partial(_body, op=op),
        out_type=(),
        scratch_types=_scratch(q, kv, out.shape[1]),
        grid=(op.num_ctas,),
        grid_names=("cta",),
        num_threads=4,
        thread_name="wg",
        compiler_params=compiler_params,
        interpret=interpret,
    )
    written = jax.new_ref(out)
    kernel(q, kv, block_tables, table, count, written)
    return jax.freeze(written)


def _scratch(q: Array, kv: Array, value_dim: int) -> dict[str, Any]:
    """Shared memory and barriers of one thread block; the names are those of ``Shared``. Queries
    and two blocks of 576 channels leave 3 KiB beside the weights."""
    dim, page = kv.shape[4], kv.shape[3]
    half, rest, copies = value_dim // 2, dim - value_dim, max(BLOCK // page, 1)
    tiling: Any = plgpu.TilingTransform  # its base class is abstract to a type checker only
    swizzle: Any = plgpu.SwizzleTransform

    def tile(*shape: int) -> Any:
        return plgpu.SMEM(shape, q.dtype, transforms=(tiling((8, 64)), swizzle(128)))

    scratch: dict[str, Any] = {
        "q": tile(2, ROWS, half),
        "k0": tile(STAGES, BLOCK, half),
        "k1": tile(STAGES, BLOCK, half),
        "p": tile(ROWS, BLOCK),
        "decay": plgpu.SMEM((ROWS,), jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=3 if rest else 2),
        "q_free": plgpu.Barrier(num_arrivals=2),
        "k_raw": plgpu.Barrier(num_arrivals=2 * copies),
        "p_full": plgpu.Barrier(),
        "p_free": plgpu.Barrier(num_arrivals=2),
    }
    if rest:
        scratch |= {"q_rest": tile(ROWS, rest), "k_rest": tile(STAGES, BLOCK, rest)}
    for part in ("k0", "k1", *["rest"] * bool(rest)):
        scratch[f"{part}_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES)
        scratch[f"{part}_free"] = plgpu.Barrier(num_barriers=STAGES)
    return scratch


def _body(*refs: Any, op: LatentOp, **shared: Any) -> None:
    gmem, smem, warpgroup = Gmem(*refs), Shared(**shared), lax.axis_index("wg")

    @pl.when(warpgroup == _PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        produce(gmem, smem, op)

    @pl.when(warpgroup == _SCORES)
    def _() -> None:
        plgpu.set_max_registers(_SCORE_REGISTERS, action="increase")
        score(gmem, smem, op)

    for half in range(2):

        @pl.when(warpgroup == half)
        def _(half: int = half) -> None:
            plgpu.set_max_registers(_SUM_REGISTERS, action="increase")
            add(gmem, smem, op, half)
