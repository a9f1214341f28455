"""Paged decode attention for Hopper in Pallas Mosaic GPU: one query per row, over its pages.

A persistent kernel: a fixed number of CTAs walks a work list of (split of a row, KV head), so a
single long row and many short ones fill the card alike, and loads never pause between items.
In a CTA one warpgroup feeds a ring of K and V blocks by TMA (one copy per page) and one computes.

The operands are swapped: S^T = K Q^T and O^T = V^T P^T. The query heads of a KV head are the
narrow side of the wgmma (8 columns, not 64 padded rows), so softmax, accumulator and partial
results have no padding worth mentioning. Split-KV: Dao et al. 2023, Flash-Decoding. Online
softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.

A row is cut at fixed positions and its splits are combined in order, so its bits do not depend on
the batch.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.decode_combine_sm90 import combine_splits
from pallas_kernels.attention.decode_config import DecodeConfig, padded_group
from pallas_kernels.attention.decode_plan import DecodePlan, max_splits

_MASKED = -1e30
_LOG2E = math.log2(math.e)
_TILE = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
_WGMMA = plgpu.Layout.WGMMA
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED

Ref = Any  # a GMEM, SMEM or barrier reference inside a kernel


@dataclass(frozen=True)
class DecodeOp:
    """Everything static that is not a shape."""

    scale: float
    window: int | None
    softcap: float | None
    config: DecodeConfig
    interpret: bool = False
    detect_races: bool = False

    def interpret_params(self) -> Any:
        if not self.interpret:
            return False
        return plgpu.InterpretGPUParams(detect_races=self.detect_races)


@dataclass(frozen=True)
class _Shape:
    """Sizes of one call; ``group`` query heads share a KV head."""

    rows: int
    kv_heads: int
    group: int
    dim: int
    dtype: Any  # of queries, pages and output: 16 bits
    page: int
    max_pages: int
    block: int  # tokens per stage

    @property
    def pages_per_block(self) -> int:
        return self.block // self.page

    @property
    def padded(self) -> int:
        return padded_group(self.group)


@functools.partial(jax.jit, static_argnames="op")
def paged_decode_sm90(
    q: Float[Array, "R H D"],
    kv: Float[Array, "P 2 K B D"],
    block_tables: Int[Array, "R M"],
    plan: DecodePlan,
    *,
    op: DecodeOp,
) -> Float[Array, "R H D"]:
    """``plan`` is ``plan_decode`` of the same window and config. Jitted so that the layers of a
    model lower and compile it once."""
    rows, heads, dim = q.shape
    kv_heads, page = kv.shape[2], kv.shape[3]
    block = op.config.block_tokens(page)
    group, width = heads // kv_heads, block_tables.shape[1]
    shape = _Shape(rows, kv_heads, group, dim, q.dtype, page, width, block)
    padding = ((0, 0), (0, 0), (0, shape.padded - shape.group), (0, 0))
    grouped = jnp.pad(q.reshape(rows, kv_heads, shape.group, dim), padding)
    splits = max_splits(shape.max_pages, page, op.window, op.config)
    outputs = _call(shape, op, splits)(grouped, kv, block_tables, plan.items, plan.num_items)
    if splits == 1:
        return outputs[0]
    out, partials, logsumexp = outputs
    slots, counts = plan.row_slots, plan.row_splits
    interpret = op.interpret_params()
    return combine_splits(out, partials, logsumexp, slots, counts, interpret=interpret)


def _call(shape: _Shape, op: DecodeOp, splits: int) -> Callable[..., Any]:
    heads, stages = shape.kv_heads * shape.group, op.config.stages
    outputs = [jax.ShapeDtypeStruct((shape.rows, heads, shape.dim), shape.dtype)]
    if splits > 1:
        slots = shape.rows * splits
        outputs += [
            jax.ShapeDtypeStruct((slots, heads, shape.dim), jnp.float32),
            jax.ShapeDtypeStruct((slots, shape.kv_heads, shape.padded), jnp.float32),
        ]
    ring = (stages, shape.block, shape.dim)
    scratch = {
        "k": plgpu.SMEM(ring, shape.dtype, transforms=_TILE),
        "v": plgpu.SMEM(ring, shape.dtype, transforms=_TILE),
        "q": plgpu.SMEM((2, shape.padded, shape.dim), shape.dtype, transforms=_TILE),
        "p": plgpu.SMEM((shape.padded, shape.block), shape.dtype, transforms=_TILE),
        "final": plgpu.SMEM((shape.padded, shape.dim), shape.dtype),
        "partial": plgpu.SMEM((shape.padded, shape.dim), jnp.float32),
        "k_full": plgpu.Barrier(num_arrivals=shape.pages_per_block, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=shape.pages_per_block, num_barriers=stages),
        "q_full": plgpu.Barrier(num_barriers=2),
        "k_free": plgpu.Barrier(num_barriers=stages),
        "v_free": plgpu.Barrier(num_barriers=stages),
        "q_free": plgpu.Barrier(num_barriers=2),
    }

    def body(*refs: Ref, **smem: Ref) -> None:
        queries, kv, tables, items, num_items, *out = refs
        walk = _Walk(shape, op, items, num_items)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 1)
        def _() -> None:
            _load(walk, queries, kv, tables, smem)

        @pl.when(warpgroup == 0)
        def _() -> None:
            _compute(walk, tuple(out), smem)

    return plgpu.kernel(
        body,
        out_type=tuple(outputs),
        grid=(op.config.num_ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=op.interpret_params(),
    )


@dataclass(frozen=True)
class _Item:
    """One split of one row, for one KV head."""

    row: Array
    slot: Array
    begin: Array  # first position the query sees
    end: Array  # one past the last position of this split
    head: Array
    first_page: Array
    blocks: Array


class _Walk:
    """This CTA's items: every ``num_ctas``-th of the list, KV heads innermost."""

    def __init__(self, shape: _Shape, op: DecodeOp, items: Ref, num_items: Ref):
        self.shape, self.op, self._items = shape, op, items
        self._first = lax.axis_index("cta")
        total = num_items[0] * shape.kv_heads
        stride = op.config.num_ctas
        self.count = lax.div(total - self._first + (stride - 1), jnp.int32(stride))
        self._total = total

    def describe(self, index: Array | int) -> tuple[Array, ...]:
        """Reads item ``index`` of this CTA; past the end the last one, so that it can be called
        ahead of time."""
        unit = lax.min(self._first + index * self.op.config.num_ctas, self._total - 1)
        item = lax.div(unit, jnp.int32(self.shape.kv_heads))
        return (*(self._items[item, field] for field in range(4)), unit)

    def unpack(self, description: tuple[Array, ...]) -> _Item:
        row, split, slot, length, unit = description
        size, page, block = self.op.config.split_tokens, self.shape.page, self.shape.block
        begin, end = jnp.int32(0), lax.min((split + 1) * size, length)
        if self.op.window is not None:
            begin = lax.max(length - self.op.window, begin)
        first_page = lax.max(split * (size // page), lax.div(begin, jnp.int32(page)))
        blocks = lax.div(end - first_page * page + (block - 1), jnp.int32(block))
        head = lax.rem(unit, jnp.int32(self.shape.kv_heads))
        return _Item(row, slot, begin, end, head, first_page, blocks)


def _load(walk: _Walk, q: Ref, kv: Ref, tables: Ref, smem: dict[str, Ref]) -> None:
    """The producer: runs ahead of the consumer by as many blocks as the ring has stages, across
    items. Page numbers and items are read one step before they are needed."""
    shape, stages = walk.shape, walk.op.config.stages

    def pages_of(item: _Item, block: Array | int) -> tuple[Array, ...]:
        start = item.first_page + block * shape.pages_per_block
        last = jnp.int32(shape.max_pages - 1)
        return tuple(
            tables[item.row, lax.min(start + i, last)] for i in range(shape.pages_per_block)
        )

    def copy(kind: int, name: str, head: Array, pages: tuple[Array, ...], step: Array) -> None:
        stage = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _() -> None:
            plgpu.barrier_wait(smem[f"{name}_free"].at[stage])

        for i, page in enumerate(pages):
            target = smem[name].at[stage, pl.ds(i * shape.page, shape.page)]
            barrier = smem[f"{name}_full"].at[stage]
            plgpu.copy_gmem_to_smem(kv.at[page, kind, head], target, barrier)

    def one_item(index: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, description = carry
        item = walk.unpack(description)
        following = walk.describe(index + 1)
        slot = lax.rem(index, jnp.int32(2))

        @pl.when(index >= 2)
        def _() -> None:
            plgpu.barrier_wait(smem["q_free"].at[slot])

        plgpu.copy_gmem_to_smem(
            q.at[item.row, item.head], smem["q"].at[slot], smem["q_full"].at[slot]
        )

        def one_block(block: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            step, pages = carry
            ahead = pages_of(item, block + 1)
            copy(0, "k", item.head, pages, step)
            copy(1, "v", item.head, pages, step)
            return step + 1, ahead

        step, _ = lax.fori_loop(0, item.blocks, one_block, (step, pages_of(item, 0)))
        return step, following

    steps, _ = lax.fori_loop(0, walk.count, one_item, (jnp.int32(0), walk.describe(0)))

    # Every arrival must have been waited for before the barriers go away.
    @pl.loop(0, lax.min(steps, jnp.int32(stages)))
    def _(stage: Array) -> None:
        plgpu.barrier_wait(smem["k_free"].at[stage])
        plgpu.barrier_wait(smem["v_free"].at[stage])

    @pl.loop(0, lax.min(walk.count, jnp.int32(2)))
    def _(slot: Array) -> None:
        plgpu.barrier_wait(smem["q_free"].at[slot])


def _compute(walk: _Walk, out: tuple[Ref, ...], smem: dict[str, Ref]) -> None:
    """The consumer. Tiles are [tokens, heads] for scores and [dim, heads] for the accumulator."""
    shape, heads = walk.shape, walk.shape.padded

    def full(sizes: tuple[int, ...], value: float) -> Array:
        layout = _WGMMA if len(sizes) == 2 else _WGMMA.reduce(0)
        return plgpu.layout_cast(jnp.full(sizes, value, jnp.float32), layout)

    def one_item(index: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, description = carry
        item = walk.unpack(description)
        following = walk.describe(index + 1)
        slot = lax.rem(index, jnp.int32(2))
        plgpu.barrier_wait(smem["q_full"].at[slot])
        one_block = functools.partial(_one_block, walk, item, smem, slot)
        state = (
            step,
            full((shape.dim, heads), 0.0),
            full((heads,), _MASKED),
            full((shape.block, heads), 0.0),
        )
        step, accumulated, maximum, total = lax.fori_loop(0, item.blocks, one_block, state)
        plgpu.barrier_arrive(smem["q_free"].at[slot])
        _store(shape, item, accumulated, maximum, total.sum(axis=0), out, smem)
        return step, following

    lax.fori_loop(0, walk.count, one_item, (jnp.int32(0), walk.describe(0)))
    plgpu.wait_smem_to_gmem(0)


def _one_block(
    walk: _Walk, item: _Item, smem: dict[str, Ref], slot: Array, block: Array, carry: Any
) -> Any:
    shape, op, heads = walk.shape, walk.op, walk.shape.padded
    step, accumulated, maximum, total = carry
    stage = lax.rem(step, jnp.int32(op.config.stages))
    position = item.first_page * shape.page + block * shape.block  # of the block's first token

    plgpu.barrier_wait(smem["k_full"].at[stage])

    def keys_by_queries(result: Ref) -> Array:
        plgpu.wgmma(result, smem["k"].at[stage], smem["q"].at[slot].transpose((1, 0)))
        return result[...]

    scores = pl.run_scoped(keys_by_queries, _accumulator(shape.block, heads))
    plgpu.barrier_arrive(smem["k_free"].at[stage])

    # Base-2 logits: exp2 is one instruction.
    if op.softcap is None:
        scores = scores * (op.scale * _LOG2E)
    else:
        scores = jnp.tanh(scores * (op.scale / op.softcap)) * (op.softcap * _LOG2E)
    token = plgpu.broadcasted_iota(jnp.int32, (shape.block, heads), 0, layout=_WGMMA) + position
    visible = token < item.end
    if op.window is not None:
        visible = visible & (token >= item.begin)
    scores = jnp.where(visible, scores, _MASKED)

    # A block always has a visible token, so the maximum is a real logit and exp2 of a masked one 0.
    raised = jnp.maximum(maximum, scores.max(axis=0))
    decay = jnp.exp2(maximum - raised)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(raised, scores.shape, (1,)))
    total = total * lax.broadcast_in_dim(decay, total.shape, (1,)) + weights
    weights = plgpu.layout_cast(weights.astype(shape.dtype), _TRANSPOSED)
    smem["p"].transpose((1, 0))[...] = weights

    plgpu.barrier_wait(smem["v_full"].at[stage])

    # Pages are reused without being cleared, and 0 * NaN is NaN.
    @pl.when(position + shape.block > item.end)
    def _() -> None:
        _clear_tail(shape, smem["v"].at[stage], item.end - position)

    plgpu.commit_smem()

    def values_by_weights(result: Ref) -> Array:
        values = smem["v"].at[stage].transpose((1, 0))
        plgpu.wgmma(result, values, smem["p"].transpose((1, 0)))
        return result[...]

    added = pl.run_scoped(values_by_weights, _accumulator(shape.dim, heads))
    plgpu.barrier_arrive(smem["v_free"].at[stage])
    accumulated = accumulated * lax.broadcast_in_dim(decay, accumulated.shape, (1,)) + added
    return step + 1, accumulated, raised, total


def _accumulator(rows: int, columns: int) -> Any:
    return plgpu.ACC((rows, columns), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]


def _clear_tail(shape: _Shape, values: Ref, tokens: Array) -> None:
    """Zeroes all but the first ``tokens`` rows of a block, a tile at a time to spare registers."""
    for row in range(0, shape.block, 64):
        index = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=_WGMMA) + row
        for column in range(0, shape.dim, 64):
            tile = values.at[pl.ds(row, 64), pl.ds(column, 64)]
            tile[...] = jnp.where(index < tokens, tile[...], jnp.zeros((), shape.dtype))


def _store(
    shape: _Shape,
    item: _Item,
    accumulated: Array,
    maximum: Array,
    total: Array,
    out: tuple[Ref, ...],
    smem: dict[str, Ref],
) -> None:
    """The row's answer if this was its only split, else a normalised partial and its weight."""
    total = jnp.maximum(total, 1e-30)
    result = accumulated / lax.broadcast_in_dim(total, accumulated.shape, (1,))
    heads = pl.ds(item.head * shape.group, shape.group)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous item's store has read its buffer

    def stage_and_copy(name: str, dtype: Any, target: Ref) -> None:
        tile = plgpu.layout_cast(result.astype(dtype), _TRANSPOSED)
        smem[name].transpose((1, 0))[...] = tile
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem[name].at[pl.ds(0, shape.group)], target)

    @pl.when(item.slot < 0)
    def _() -> None:
        stage_and_copy("final", shape.dtype, out[0].at[item.row, heads])

    if len(out) > 1:

        @pl.when(item.slot >= 0)
        def _() -> None:
            stage_and_copy("partial", jnp.float32, out[1].at[item.slot, heads])
            out[2].at[item.slot, item.head][...] = maximum + jnp.log2(total)
