"""Paged decode attention for Hopper in Pallas Mosaic GPU: one query per row, over its pages.

A persistent kernel: a fixed number of CTAs walks a work list of (splits of a row, KV head), so a
single long row and many short ones fill the card alike, and loads never pause between items.
In a CTA one warpgroup feeds a ring of K and V blocks by TMA (one copy per page) and one computes
(of latents, two); their code is in decode_sm90_producer.py and decode_sm90_consumer.py.

The operands are swapped: S^T = K Q^T and O^T = V^T P^T. The query heads of a KV head are the
narrow side of the wgmma (8 columns, not 64 padded rows), so softmax, accumulator and partial
results have no padding worth mentioning. The columns never mix, so it does not matter what is in
those of heads that do not exist. Split-KV: Dao et al. 2023, Flash-Decoding. Online softmax:
Milakov & Gimelshein 2018, arXiv:1805.02867.

A row is summed in fixed stretches that are joined in order, by one CTA or by several and the
combine kernel, so its bits do not depend on the batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.decode_combine_sm90 import combine_partials
from pallas_kernels.attention.decode_config import GROUP_TILE, head_groups
from pallas_kernels.attention.decode_plan import DecodePlan
from pallas_kernels.attention.decode_sm90_consumer import Outputs, consume
from pallas_kernels.attention.decode_sm90_items import DecodeOp, DecodeShape, Walk
from pallas_kernels.attention.decode_sm90_producer import produce
from pallas_kernels.attention.decode_sm90_sums import TILE, Ref
from pallas_kernels.attention.decode_sm90_variant import decode_operands
from pallas_kernels.attention.variant_params import Params
from pallas_kernels.attention.widen_sm90 import multiplied
from pallas_kernels.head_dims import cut_heads, pad_heads

# Of latents, per thread; a thread block of 384 threads starts with 168 each.
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40


@functools.partial(jax.jit, static_argnames=("op", "tokens"))
def paged_decode_sm90(
    q: Float[Array, "R H D"],
    kv: Float[Array, "P S K B W"],
    block_tables: Int[Array, "R M"],
    plan: DecodePlan,
    params: Params | None = None,
    token_pages: Float[Array, "P N K B"] | None = None,
    *,
    op: DecodeOp,
    tokens: int | None = None,
) -> Float[Array, "T H V"]:
    """``tokens``, at least R, asks for an output with room for more queries, which nothing is
    written to. ``plan`` is ``plan_decode`` of the same window, variant and config; ``params`` is
    ``param_arrays`` of a variant that has any, ``token_pages`` its per_token params. Jitted so that
    the layers of a model lower and compile it once. Pages may hold wider heads than the queries,
    with zeros behind. Of latents (``op.value_dim``) S is 1 and V their channels, otherwise D."""
    own_dim, q = q.shape[2], pad_heads(q, kv.shape[4])
    rows, heads, dim = q.shape
    kv_heads, page = head_groups(heads, kv.shape[2], op.value_dim), kv.shape[3]
    group = heads // kv_heads
    grouped = multiplied(q, kv.dtype).reshape(rows, kv_heads, group, dim)
    block = op.config.block_tokens(page, dim)
    sizes = (rows, kv_heads, group, dim, grouped.dtype, page, block)
    numbers = len(op.variant.token_params)
    dtypes: dict[str, Any] = {"pages": kv.dtype, "answers": q.dtype}
    shape = DecodeShape(*sizes, **dtypes, numbers=numbers, value_dim=op.value_dim)
    if group > GROUP_TILE and group % GROUP_TILE:  # a copy takes one tile that ends early, not two
        missing = shape.padded - group
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, missing), (0, 0)))
    operands = decode_operands(op.variant, params or {}, shape)
    call = _call(shape, op, (tokens or rows, *grouped.shape[1:3], shape.answer_dim), plan.num_slots)
    given = [x for x in (plan.visits, token_pages) if x is not None]
    out, *partials = call(grouped, kv, block_tables, plan.items, plan.counts, *operands, *given)
    if partials:
        values, stats = partials
        named = zip(op.variant.array_params, operands, strict=True)
        sinks = [operand for param, operand in named if param.name == op.variant.sinks]
        out = combine_partials(out, values, stats, plan, *sinks, op=op)
    out = out[:, :, :group].reshape(-1, heads, shape.answer_dim)
    return out if shape.is_latent else cut_heads(out, own_dim)


def _call(
    shape: DecodeShape, op: DecodeOp, stored: tuple[int, ...], slots: int
) -> Callable[..., Any]:
    """``stored`` is the shape of the answers: queries, KV heads, heads of a group with room in
    memory, head dim."""
    answers = jax.ShapeDtypeStruct(stored, shape.answers)
    partials = [
        jax.ShapeDtypeStruct((slots, shape.kv_heads, *sizes, shape.padded), jnp.float32)
        for sizes in ((shape.answer_dim,), (2,))
    ]

    def body(*refs: Ref, **smem: Ref) -> None:
        queries, kv, tables, items, counts, *rest = refs
        rest = list(rest)
        params = tuple(rest.pop(0) for _ in op.variant.array_params)
        walk = Walk(shape, op, items, counts, rest.pop(0) if op.variant.is_mapped else None)
        numbers = rest.pop(0) if shape.numbers else None
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == shape.consumers)
        def _() -> None:
            if shape.is_latent:
                plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            produce(walk, queries, kv, tables, smem, numbers)

        @pl.when(warpgroup < shape.consumers)
        def _() -> None:
            if shape.is_latent:
                plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            own = (numbers, tables) if shape.numbers else None
            consume(walk, counts, params, Outputs(*rest), smem, warpgroup, own)

    return plgpu.kernel(
        body,
        out_type=(answers, *(partials if slots else ())),
        grid=(op.config.num_ctas,),
        grid_names=("cta",),
        num_threads=1 + shape.consumers,
        thread_name="warpgroup",
        scratch_types=_scratch(shape, op.config.stages),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=op.interpret_params(),
    )


def _scratch(shape: DecodeShape, stages: int) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""

    def tile(*sizes: int, dtype: Any = shape.dtype) -> Any:
        return plgpu.SMEM(sizes, dtype, transforms=TILE)

    def ring() -> Any:
        sizes = (stages, shape.block, shape.dim)
        return plgpu.SMEM(sizes, shape.pages) if shape.widens else tile(*sizes)

    wide = {name: tile(shape.block, shape.dim) for name in ("wide_k", "wide_v") if shape.widens}
    if shape.numbers:
        wide["numbers"] = plgpu.SMEM((stages, shape.numbers, shape.block), jnp.float32)
    filled_by, slots = shape.pages_per_block * (1 + shape.numbers), shape.query_slots
    both = {
        "k": ring(),
        "q": tile(slots, shape.padded, shape.dim),
        "k_full": plgpu.Barrier(num_arrivals=filled_by, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=shape.consumers, num_barriers=stages),
        "q_full": plgpu.Barrier(num_barriers=slots),
        "q_free": plgpu.Barrier(num_arrivals=shape.consumers, num_barriers=slots),
    }
    if shape.is_latent:
        each = shape.consumers, shape.padded
        if shape.shares_scores:
            both["scores"] = plgpu.SMEM((2, 2, shape.block, shape.padded), jnp.float32)
            both["scores_full"] = plgpu.Barrier(num_barriers=2 * shape.consumers)
        return both | {
            "p": tile(*each, shape.block),
            "out": tile(*each, shape.columns, dtype=shape.answers),
            "turn": plgpu.Barrier(num_barriers=shape.consumers),
        }
    values = {
        "v": ring(),
        "p": tile(shape.padded, shape.block),
        "out": tile(shape.padded, shape.dim, dtype=shape.answers),
        "v_full": plgpu.Barrier(num_arrivals=shape.pages_per_block, num_barriers=stages),
        "v_free": plgpu.Barrier(num_barriers=stages),
    }
    return wide | both | values
