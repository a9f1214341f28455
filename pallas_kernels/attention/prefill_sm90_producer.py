"""The producer warpgroup of the prefill kernel: fetches queries, keys and values by TMA."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.decode_sm90_producer import issue
from pallas_kernels.attention.prefill_sm90_items import (
    WGMMA,
    Gmem,
    Item,
    PrefillOp,
    Shared,
    block_at,
    my_items,
    rows_and_head,
)
from pallas_kernels.attention.prefill_tiles import ROWS
from pallas_kernels.attention.widen_sm90 import widen

_NUMBERS = 2  # where per_token params follow keys and values
_WIDENED = 4096  # numbers at a time: a thread has 40 registers


def produce(gmem: Gmem, smem: Shared, op: PrefillOp) -> None:
    mine, read = my_items(gmem, op)
    stages = op.config.stages
    fetch = _fetch if smem.narrow is None else _fetch_narrow

    def one_item(turn: Array, done: Array) -> Array:
        item = read(turn)

        def one_block(place: Array, _: None) -> None:
            step = done + place - item.begin
            fetch(gmem, smem, op, item, place, step)

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


def _fetch(gmem: Gmem, smem: Shared, op: PrefillOp, item: Item, place: Array, step: Array) -> None:
    """One block of keys and values, and before the first of an item its queries."""
    config, block = op.config, block_at(gmem, item, place)
    stage = lax.rem(step, jnp.int32(config.stages))
    count, part = _parts(gmem, op, item, block)
    size = config.block_kv // count

    def copy(which: int, target: Any, barrier: Any) -> None:
        def copy_part(i: int) -> None:
            rows = target.at[stage, pl.ds(i * size, size)]
            plgpu.copy_gmem_to_smem(part(which, i), rows, barrier)
            for param in range(len(op.variant.token_params) if which == 0 else 0):
                numbers = smem.numbers.at[stage, param, pl.ds(i * size, size)]
                plgpu.copy_gmem_to_smem(part(_NUMBERS + param, i), numbers, barrier)

        issue(copy_part, count, config.issuers)

    @pl.when(step >= config.stages)
    def _() -> None:
        plgpu.barrier_wait(smem.k_free.at[stage])

    copy(0, smem.k, smem.k_full.at[stage])

    @pl.when(place == item.begin)
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
        zero_past(smem.v.at[stage], written)
        for _ in range(count):
            plgpu.barrier_arrive(smem.v_full.at[stage])


def _parts(
    gmem: Gmem, op: PrefillOp, item: Item, block: Array
) -> tuple[int, Callable[[int, int], Any]]:
    """How many copies fetch a block, and what the i-th takes: whole pages, or one part of a page,
    of keys (0), values (1) or a per_token param."""
    page_size, block_kv = gmem.kv.shape[3], op.config.block_kv
    count = max(block_kv // page_size, 1)
    blocks_per_page = max(page_size // block_kv, 1)
    kv_heads_of = gmem.q.shape[1] // gmem.kv.shape[2] // op.config.heads_per_tile
    kv_head = lax.div(item.unit, jnp.int32(kv_heads_of))
    last_page = lax.div(item.seq_len - 1, jnp.int32(page_size))
    # Past the last page it is fetched again: masked, and no table entry past the end is used.
    first = block * count if blocks_per_page == 1 else lax.div(block, jnp.int32(blocks_per_page))
    pages = [gmem.block_tables[item.slot, lax.min(first + i, last_page)] for i in range(count)]

    def part(which: int, i: int) -> Any:
        source = gmem.kv if which < _NUMBERS else gmem.token_pages
        which = which if which < _NUMBERS else which - _NUMBERS
        if blocks_per_page == 1:
            return source.at[pages[i], which, kv_head]
        start = lax.rem(block, jnp.int32(blocks_per_page)) * block_kv
        return source.at[pages[i], which, kv_head, pl.ds(start, block_kv)]

    return count, part


def _fetch_narrow(
    gmem: Gmem, smem: Shared, op: PrefillOp, item: Item, place: Array, step: Array
) -> None:
    """The same for pages of eight bits: they are widened here, while the next are on their way."""
    config, block = op.config, block_at(gmem, item, place)
    size, rows = config.block_kv, _WIDENED // gmem.kv.shape[4]
    stage = lax.rem(step, jnp.int32(config.stages))

    def copy(which: int, block: Array) -> None:
        count, part = _parts(gmem, op, item, block)
        length = size // count

        def copy_part(i: int) -> None:
            target = smem.narrow.at[which, pl.ds(i * length, length)]
            plgpu.copy_gmem_to_smem(part(which, i), target, smem.narrow_full.at[which])

        issue(copy_part, count, config.issuers)

    @pl.when(place == item.begin)
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

    @pl.when(place == item.begin)
    def _() -> None:
        _fetch_queries(gmem, smem, op, item, step)

    @pl.when(place + 1 < item.end)
    def _() -> None:
        copy(0, block_at(gmem, item, place + 1))

    take(1, smem.v, smem.v_free, smem.v_full, item.seq_len - block * size)


def _fetch_queries(gmem: Gmem, smem: Shared, op: PrefillOp, item: Item, step: Array) -> None:
    @pl.when(step > 0)
    def _() -> None:
        plgpu.barrier_wait(smem.q_free)

    for consumer in range(2):
        row, head = rows_and_head(item, consumer, op.config)
        tokens = pl.ds(item.token + row, ROWS)
        plgpu.copy_gmem_to_smem(gmem.q.at[tokens, head], smem.q.at[consumer], smem.q_full)


def zero_past(values: Any, written: Array) -> None:
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
