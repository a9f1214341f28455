"""Joins the partial sums of rows that several CTAs walked, in order of position."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.decode_config import GROUP_TILE
from pallas_kernels.attention.decode_plan import DecodePlan
from pallas_kernels.attention.decode_sm90_items import DecodeOp
from pallas_kernels.attention.decode_sm90_sums import (
    MASKED,
    TILE,
    WGMMA,
    Ref,
    Sum,
    empty_sum,
    join,
    load_partial,
    sink_sum,
    store_answer,
)

_DIM = 64  # a CTA joins this much of the head dim at a time, of GROUP_TILE heads


class _Gmem(NamedTuple):
    values: Ref
    stats: Ref
    rows: Ref
    counts: Ref
    out: Ref
    sinks: Ref = None


class _Unit(NamedTuple):
    """A slice of the head dim and of the heads of one KV head, of one split row."""

    row: Array
    base: Array  # slot of the first partial sum
    first: Array  # partial sum, from position 0 on
    end: Array
    index: Array  # among all units


def combine_partials(
    out: Float[Array, "R K G D"],
    values: Float[Array, "S K D N"],
    stats: Float[Array, "S K 2 N"],
    plan: DecodePlan,
    *sinks: Float[Array, "K N"],
    op: DecodeOp,
) -> Float[Array, "R K G D"]:
    """Returns ``out`` with the rows of several items replaced; G may be less than N. With
    ``sinks`` their logits are joined last."""
    kv_heads, dim, heads = values.shape[1:]
    units = kv_heads * (dim // _DIM) * (heads // GROUP_TILE)  # of a row
    ctas = min(op.config.num_ctas, plan.split_rows.shape[0] * units)

    def body(*refs: Ref, staging: Ref) -> None:
        values, stats, rows, counts, *joined, target = refs
        gmem = _Gmem(values, stats, rows, counts, target, joined[0] if joined else None)
        cta = lax.axis_index("cta")
        total = gmem.counts[2] * units

        def describe(turn: Array) -> _Unit:
            # Read ahead of time, and without waiting for how many there are.
            index = cta + turn * ctas
            entry = lax.min(lax.div(index, jnp.int32(units)), jnp.int32(gmem.rows.shape[0] - 1))
            row, base, first, end = (gmem.rows[entry, field] for field in range(4))
            return _Unit(row, base, first, end, index)

        def one_unit(turn: Array, unit: _Unit) -> _Unit:
            following = describe(turn + 1)
            _combine(op.config.splits_per_chunk, gmem, staging, unit)
            return following

        turns = lax.div(total - cta + (ctas - 1), jnp.int32(ctas))
        lax.fori_loop(0, turns, one_unit, describe(jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)

    target = jax.new_ref(out)
    plgpu.kernel(
        body,
        out_type=(),
        grid=(ctas,),
        grid_names=("cta",),
        scratch_types={"staging": plgpu.SMEM((GROUP_TILE, _DIM), out.dtype, transforms=TILE)},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=op.interpret_params(),
    )(values, stats, plan.split_rows, plan.counts, *sinks, target)
    return jax.freeze(target)


def _combine(batch: int, gmem: _Gmem, staging: Ref, unit: _Unit) -> None:
    """``batch`` is the number of splits in a chunk: partial sums of a chunk's splits must be
    joined to the chunk first, those of chunks go straight to the row."""
    kv_heads, dim, heads = gmem.values.shape[1:]
    slices, tiles = jnp.int32(dim // _DIM), jnp.int32(heads // GROUP_TILE)
    columns = pl.ds(lax.rem(unit.index, slices) * _DIM, _DIM)
    tile = pl.ds(lax.rem(lax.div(unit.index, slices), tiles) * GROUP_TILE, GROUP_TILE)
    head = lax.rem(lax.div(unit.index, slices * tiles), jnp.int32(kv_heads))
    are_splits = gmem.counts[1] == 1
    nothing = empty_sum(_DIM, GROUP_TILE)

    def load(index: Array) -> Sum:
        slot = unit.base + lax.clamp(unit.first, index, unit.end - 1) - unit.first
        values = gmem.values.at[slot, head, columns, tile]
        partial = load_partial(values, gmem.stats.at[slot, head, :, tile])
        exists = lax.broadcast((index >= unit.first) & (index < unit.end), (GROUP_TILE,))
        return partial._replace(maximum=jnp.where(exists, partial.maximum, MASKED))

    def one_batch(index: Array, joined: Sum) -> Sum:
        loaded = [load(index * batch + i) for i in range(batch)]  # all in flight at once
        total = functools.reduce(join, loaded, _choose(are_splits, nothing, joined))
        return _choose(are_splits, join(joined, total), total)

    size = jnp.int32(batch)
    batches = (lax.div(unit.first, size), lax.div(unit.end + (size - 1), size))
    answer = lax.fori_loop(*batches, one_batch, nothing)
    if gmem.sinks is not None:
        logits = plgpu.load(gmem.sinks.at[head, tile], layout=WGMMA.reduce(0), optimized=False)
        answer = join(answer, sink_sum(logits, _DIM))
    store_answer(answer, staging, gmem.out.at[unit.row, head, tile, columns])


def _choose(condition: Array, yes: Sum, no: Sum) -> Sum:
    pairs = zip(yes, no, strict=True)
    return Sum(*(jnp.where(lax.broadcast(condition, a.shape), a, b) for a, b in pairs))
