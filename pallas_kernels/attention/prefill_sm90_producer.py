"""The producer warpgroup of the prefill kernel: fetches queries, keys and values by TMA."""

from typing import Any

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
    my_items,
    rows_and_head,
)
from pallas_kernels.attention.prefill_tiles import ROWS
from pallas_kernels.attention.widen_sm90 import widen

_WIDENED = 4096  # numbers at a time: a thread has 40 registers


def produce(gmem: Gmem, smem: Shared, op: PrefillOp) -> None:
    mine, read = my_items(gmem, op)
    stages = op.config.stages
    fetch = _fetch if smem.narrow is None else _fetch_narrow

    def one_item(turn: Array, done: Array) -> Array:
        item = read(turn)

        def one_block(block: Array, _: None) -> None:
            step = done + block - item.begin
            fetch(gmem, smem, op, item, block, step)

        lax.fori_loop(item.begin, item.end, one_block, None)
        return done + item.end - item.begin

    done = lax.fori_loop(0, mine, one_item, jnp.int32(0))

    @pl.when(done > 0)
    def _() -> None:
        plgpu.barrier_wait(smem.q_free)

    @pl.loop(lax.max(done - stages, jnp.int32(0)), done)
    def _(step: Array) -> None:
        stage = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(smem.k_free.at[stage])
        plgpu.barrier_wait(smem.v_free.at[stage])


def _fetch(gmem: Gmem, smem: Shared, op: PrefillOp, item: Item, block: Array, step: Array) -> None:
    """One block of keys and values, and before the first of an item its queries."""
    config, page_size = op.config, gmem.kv.shape[3]
    count = config.block_kv // page_size
    kv_head = _kv_head(gmem, op, item)
    stage = lax.rem(step, jnp.int32(config.stages))
    pages = _pages(gmem, op, item, block)

    def copy(which: int, target: Any, barrier: Any) -> None:
        for i, page in enumerate(pages):
            rows = target.at[stage, pl.ds(i * page_size, page_size)]
            plgpu.copy_gmem_to_smem(gmem.kv.at[page, which, kv_head], rows, barrier)

    @pl.when(step >= config.stages)
    def _() -> None:
        plgpu.barrier_wait(smem.k_free.at[stage])

    copy(0, smem.k, smem.k_full.at[stage])

    @pl.when(block == item.begin)
    def _() -> None:
        _fetch_queries(gmem, smem, op, item, step)

    @pl.when(step >= config.stages)
    def _() -> None:
        plgpu.barrier_wait(smem.v_free.at[stage])

    written = item.seq_len - block * config.block_kv

    @pl.when(written >= config.block_kv)
    def _() -> None:
        copy(1, smem.v, smem.v_full.at[stage])

    @pl.when(written < config.block_kv)
    def _() -> None:
        copy(1, smem.v, smem.v_raw)
        plgpu.barrier_wait(smem.v_raw)
        _zero_past(smem.v.at[stage], written)
        for _ in range(count):
            plgpu.barrier_arrive(smem.v_full.at[stage])


def _kv_head(gmem: Gmem, op: PrefillOp, item: Item) -> Array:
    kv_heads_of = gmem.q.shape[1] // gmem.kv.shape[2] // op.config.heads_per_tile
    return lax.div(item.unit, jnp.int32(kv_heads_of))


def _pages(gmem: Gmem, op: PrefillOp, item: Item, block: Array) -> list[Array]:
    page_size = gmem.kv.shape[3]
    count = op.config.block_kv // page_size
    last_page = lax.div(item.seq_len - 1, jnp.int32(page_size))
    # Past the last page it is fetched again: masked, and no table entry past the end is used.
    return [
        gmem.block_tables[item.slot, lax.min(block * count + i, last_page)] for i in range(count)
    ]


def _fetch_narrow(
    gmem: Gmem, smem: Shared, op: PrefillOp, item: Item, block: Array, step: Array
) -> None:
    """The same for pages of eight bits: they are widened here, while the next are on their way."""
    config, page_size, head = op.config, gmem.kv.shape[3], _kv_head(gmem, op, item)
    size, rows = config.block_kv, _WIDENED // gmem.kv.shape[4]
    stage = lax.rem(step, jnp.int32(config.stages))

    def copy(which: int, block: Array) -> None:
        for i, page in enumerate(_pages(gmem, op, item, block)):
            target = smem.narrow.at[which, pl.ds(i * page_size, page_size)]
            barrier = smem.narrow_full.at[which]
            plgpu.copy_gmem_to_smem(gmem.kv.at[page, which, head], target, barrier)

    @pl.when(block == item.begin)
    def _() -> None:
        copy(0, block)

    copy(1, block)

    def take(which: int, target: Any, free: Any, full: Any, written: Array | None) -> None:
        @pl.when(step >= config.stages)
        def _() -> None:
            plgpu.barrier_wait(free.at[stage])

        plgpu.barrier_wait(smem.narrow_full.at[which])
        narrow, wide = smem.narrow.at[which], target.at[stage]
        if written is None:
            widen(narrow, wide, rows=rows)
        else:
            pl.when(written >= size)(lambda: widen(narrow, wide, rows=rows))
            pl.when(written < size)(lambda: widen(narrow, wide, rows=rows, written=written))
        plgpu.commit_smem()
        plgpu.barrier_arrive(full.at[stage])

    take(0, smem.k, smem.k_free, smem.k_full, None)

    @pl.when(block == item.begin)
    def _() -> None:
        _fetch_queries(gmem, smem, op, item, step)

    @pl.when(block + 1 < item.end)
    def _() -> None:
        copy(0, block + 1)

    take(1, smem.v, smem.v_free, smem.v_full, item.seq_len - block * size)


def _fetch_queries(gmem: Gmem, smem: Shared, op: PrefillOp, item: Item, step: Array) -> None:
    @pl.when(step > 0)
    def _() -> None:
        plgpu.barrier_wait(smem.q_free)

    for consumer in range(2):
        row, head = rows_and_head(item, consumer, op.config)
        tokens = pl.ds(item.token + row, ROWS)
        plgpu.copy_gmem_to_smem(gmem.q.at[tokens, head], smem.q.at[consumer], smem.q_full)


def _zero_past(values: Any, written: Array) -> None:
    """Pages are reused without being cleared: what lies past a row's end may be another row's
    NaN, and 0 * NaN is NaN."""
    length, dim = values.shape
    for row in range(0, length, ROWS):

        @pl.when(written < row + ROWS)
        def _(row: int = row) -> None:
            for column in range(0, dim, 64):
                part = values.at[pl.ds(row, ROWS), pl.ds(column, 64)]
                old = plgpu.load(part, layout=WGMMA)
                index = plgpu.broadcasted_iota(jnp.int32, (ROWS, 64), 0, layout=WGMMA)
                part[...] = jnp.where(index < written - row, old, jnp.zeros_like(old))

    plgpu.commit_smem()
