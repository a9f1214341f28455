"""A consumer warpgroup of the prefill kernel: 64 query rows against all their keys.

The two consumers alternate between tensor cores and exponentials as in FlashAttention-3
(Shah et al. 2024, arXiv:2407.08608). Softmax is online and in base 2.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.prefill_sm90_items import (
    WGMMA,
    Gmem,
    Item,
    PrefillOp,
    Shared,
    Walk,
    ceil_div,
    rows_and_head,
)
from pallas_kernels.attention.prefill_tiles import ALIGN, ROWS

_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_FLOOR = -1e30  # start of the running maximum: finite, so that a row without keys stays at zero


class _Sums(NamedTuple):
    """Of the keys so far, for each of a consumer's 64 query rows."""

    values: Array  # [ROWS, D]
    maximum: Array  # [ROWS], in scaled units, so that exp2's argument is one multiply-add
    total: Array  # [ROWS]


class _Target(NamedTuple):
    """Where the rows of an item go: rows low <= i < high of the 64 that start at ``token``."""

    token: Array
    head: Array
    low: Array
    high: Array

    @classmethod
    def of(cls, item: Item, op: PrefillOp, consumer: Array) -> "_Target":
        row, head = rows_and_head(item.unit, consumer, op.config)
        low = lax.clamp(jnp.int32(0), item.low - row, jnp.int32(ROWS))
        high = lax.clamp(jnp.int32(0), item.high - row, jnp.int32(ROWS))
        return cls(item.token + row, head, low, high)


class _Finished(NamedTuple):
    """The last item, not stored yet: that waits for the next item's first product, because what
    a consumer does between two products of its turn keeps the tensor cores waiting."""

    target: _Target
    sums: _Sums


class _Work(NamedTuple):
    smem: Shared
    op: PrefillOp
    item: Item
    consumer: Array
    done: Array  # steps before this item

    def stage(self, block: Array) -> Array:
        return lax.rem(self.done + block - self.item.begin, jnp.int32(self.op.config.stages))


def consume(gmem: Gmem, smem: Shared, op: PrefillOp, consumer: Array) -> None:
    walk, dim = Walk(gmem, op), smem.q.shape[2]

    def one_item(turn: Array, carry: tuple[Array, _Finished]) -> tuple[Array, _Finished]:
        done, before = carry
        words = walk.describe(turn)  # they arrive under the first product, which needs none
        stage = lax.rem(done, jnp.int32(op.config.stages))
        plgpu.barrier_wait(smem.q_full.at[consumer])
        plgpu.barrier_wait(smem.k_full.at[stage])
        scores = _multiply_keys(smem, op, consumer, stage, op.config.block_kv)
        item = Item.of(words, op)
        work = _Work(smem, op, item, consumer, done)
        _release(work, item.begin)
        _store(gmem, smem, consumer, before)
        sums = _absorb(work, True, item.begin, scores, _nothing(dim))
        sums = _attend_others(work, sums)
        return done + item.end - item.begin, _Finished(_Target.of(item, op, consumer), sums)

    def one_blank(turn: Array, before: _Finished) -> _Finished:
        _store(gmem, smem, consumer, before)
        item = Item.of(walk.describe_blank(turn), op)
        return _Finished(_Target.of(item, op, consumer), _nothing(dim))

    nowhere = _Target(*(jnp.int32(0) for _ in _Target._fields))
    if op.config.take_turns:  # consumer 1 stays half a step behind
        pl.when(consumer == 1)(lambda: _meet(smem))
    start = (jnp.int32(0), _Finished(nowhere, _nothing(dim)))
    _, last = lax.fori_loop(0, walk.count, one_item, start)
    if op.config.take_turns:
        pl.when(consumer == 0)(lambda: _meet(smem))
    lax.fori_loop(0, walk.blanks + 1, one_blank, last)
    plgpu.wait_smem_to_gmem(0)


def _nothing(dim: int) -> _Sums:
    def rows(value: float) -> Array:
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA.reduce(1))

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), WGMMA)
    return _Sums(zeros, rows(_FLOOR), rows(0.0))


def _meet(smem: Shared) -> None:
    plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(smem.turn)


def _spread(rows: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(rows, (ROWS, columns), [0])


def _attend_others(work: _Work, sums: _Sums) -> _Sums:
    """All blocks but the first, which always goes through the mask.

    Blocks that every row sees whole need none: those up to the first row's own position, and with
    a window those from the last row's oldest key on. Of the last block half is enough if no row
    sees more: the rest would add zeros, which changes no bit.
    """
    item, config, window = work.item, work.op.config, work.op.window
    row, _ = rows_and_head(item.unit, work.consumer, config)
    low, high = lax.max(item.low, row), lax.min(item.high, row + ROWS)
    size, half = config.block_kv, config.block_kv // 2
    first, end = item.begin + 1, item.end
    if half % ROWS == 0:
        is_half = (end > first) & (item.reach - (end - 1) * size <= half)
        end -= is_half.astype(jnp.int32)
    clear_begin, clear_end = first, lax.div(item.position + low + 1, jnp.int32(size))
    if window is not None:
        oldest = lax.max(item.position + high - window, jnp.int32(0))
        clear_begin = lax.clamp(first, ceil_div(oldest, size), end)
    clear_end = lax.clamp(clear_begin, clear_end, end)

    def steps(begin: Array, end: Array, sums: _Sums, *, masked: bool, keys: int = size) -> _Sums:
        return lax.fori_loop(begin, end, functools.partial(_step, work, masked, keys), sums)

    if window is not None:
        sums = steps(first, clear_begin, sums, masked=True)
    sums = steps(clear_begin, clear_end, sums, masked=False)
    sums = steps(clear_end, end, sums, masked=True)
    return steps(end, item.end, sums, masked=True, keys=half) if half % ROWS == 0 else sums


def _step(work: _Work, masked: bool, keys: int, block: Array, sums: _Sums) -> _Sums:
    """One block of keys, or the first ``keys`` of it."""
    scores = _multiply_keys(work.smem, work.op, work.consumer, work.stage(block), keys)
    _release(work, block)
    return _absorb(work, masked, block, scores, sums)


def _multiply_keys(smem: Shared, op: PrefillOp, consumer: Array, stage: Array, keys: int) -> Array:
    block = smem.k.at[stage]
    if keys < block.shape[0]:
        block = block.at[pl.ds(0, keys)]

    def multiply(scores: Any) -> Array:
        plgpu.wgmma(scores, smem.q.at[consumer], block.transpose((1, 0)))
        if op.config.take_turns:
            _meet(smem)
        return scores[...]

    return pl.run_scoped(multiply, _Accumulator((ROWS, keys), jnp.float32))


def _release(work: _Work, block: Array) -> None:
    """The keys of a block, and with the last one the queries."""
    plgpu.barrier_arrive(work.smem.k_free.at[work.stage(block)])

    @pl.when(block == work.item.end - 1)
    def _() -> None:
        plgpu.barrier_arrive(work.smem.q_free.at[work.consumer])


def _absorb(work: _Work, masked: bool, block: Array, scores: Array, sums: _Sums) -> _Sums:
    """Softmax and weighted values of one block whose scores are known."""
    smem, op, item = work.smem, work.op, work.item
    config, keys, stage = op.config, scores.shape[1], work.stage(block)
    factor = op.scale * math.log2(math.e)
    if op.softcap is not None:
        scores = jnp.tanh(scores * (op.scale / op.softcap))
        factor = op.softcap * math.log2(math.e)
    if masked:
        row, _ = rows_and_head(item.unit, work.consumer, config)
        scores = _mask(scores, item.position + row, block * config.block_kv, op.window)
    maximum = jnp.maximum(sums.maximum, scores.max(axis=1) * factor)
    decay = jnp.exp2(sums.maximum - maximum)
    weights = jnp.exp2(scores * factor - _spread(maximum, keys))
    values = sums.values * _spread(decay, sums.values.shape[1])
    narrow = weights.astype(smem.v.dtype)
    total = sums.total * decay + weights.sum(axis=1)
    # Keeps the compiler from moving softmax arithmetic past the barriers.
    values, total, maximum, narrow = lax.optimization_barrier((values, total, maximum, narrow))
    if config.take_turns:
        plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(smem.v_full.at[stage])
    if config.take_turns:
        plgpu.barrier_wait(smem.turn)

    # Outside the closure: Mosaic rejects a literal in it, and ``block`` may be one.
    next_stage, has_next = work.stage(block + 1), block + 1 < item.end

    def wait_for_next_keys() -> None:
        @pl.when(has_next)
        def _() -> None:
            plgpu.barrier_wait(smem.k_full.at[next_stage])

    values = _add_values(smem, work.consumer, stage, narrow, values, wait_for_next_keys)
    plgpu.barrier_arrive(smem.v_free.at[stage])
    return _Sums(values, maximum, total)


def _mask(scores: Array, position: Array, key: Array, window: int | None) -> Array:
    def index(dimension: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, scores.shape, dimension, layout=WGMMA)

    ahead = index(1) - index(0) + (key - position)  # key position minus query position
    visible = ahead <= 0
    if window is not None:
        visible &= ahead > -window
    return jnp.where(visible, scores, -jnp.inf)


def _add_values(
    smem: Shared,
    consumer: Array,
    stage: Array,
    weights: Array,
    accumulated: Array,
    meanwhile: Callable[[], None],
) -> Array:
    """``accumulated + weights @ values``; ``meanwhile`` runs under the multiplication."""
    keys = pl.ds(0, weights.shape[1])
    values = smem.v.at[stage]
    if weights.shape[1] < values.shape[0]:
        values = values.at[keys]
    if smem.p is None:

        def multiply(accumulator: Any) -> None:
            plgpu.wgmma(accumulator, weights, values)
            meanwhile()

        return pl.run_state(multiply)(_Accumulator.init(accumulated))
    staged = smem.p.at[consumer, :, keys]
    staged[...] = weights
    plgpu.commit_smem()

    def staged_multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, staged, values)
        return accumulator[...]

    added = pl.run_scoped(staged_multiply, _Accumulator(accumulated.shape, jnp.float32))
    meanwhile()
    return accumulated + added


def _store(gmem: Gmem, smem: Shared, consumer: Array, finished: _Finished) -> None:
    """Writes the item's own rows and no other: their neighbours belong to other thread blocks."""
    (token, head, low, high), sums = finished
    token = pl.multiple_of(token, ALIGN)  # a value that a loop carries is not known to be one
    result = sums.values * _spread(1.0 / jnp.maximum(sums.total, 1e-30), sums.values.shape[1])
    whole = high - low == ROWS
    narrow = result.astype(smem.o.dtype)
    plgpu.wait_smem_to_gmem(0)  # of the item before

    @pl.when(whole)
    def _() -> None:
        smem.o.at[consumer][...] = narrow
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.o.at[consumer], gmem.out.at[pl.ds(token, ROWS), head])

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        smem.o_rows.at[consumer][...] = narrow
        plgpu.commit_smem()
        start, size = low, ROWS // 2
        while size:  # a transfer's size is static: one per binary digit of the number of rows
            digit = (high - low) & size

            @pl.when(digit != 0)
            def _(start: Array = start, size: int = size) -> None:
                source = smem.o_rows.at[consumer, pl.ds(start, size)]
                target = gmem.out.at[pl.ds(token + start, size), head]
                plgpu.copy_smem_to_gmem(source, target)

            start, size = start + digit, size // 2
