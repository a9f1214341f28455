"""The producer warpgroup of the prefill kernel: fetches queries, keys and values by TMA."""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    Items,
    PrefillOp,
    Shared,
    block_at,
    rows_and_head,
)
from pallas_kernels.attention.prefill_tiles import ROWS
from pallas_kernels.attention.widen_sm90 import widen

_NUMBERS = 2  # where per_token params follow keys and values
_WIDENED = 4096  # numbers at a time: a thread has 40 registers


def produce(gmem: Gmem, smem: Shared, op: PrefillOp) -> None:
    """Keys run one block ahead of values, as consumers multiply them."""
    items = Items(gmem, op)
    kind = _Fetch if smem.narrow is None else _FetchNarrow

    def one_item(turn: Array, carry: tuple[Array, tuple[Array, ...]]) -> Any:
        done, description = carry
        item, following = items.item(description), items.describe(turn + 1)
        fetch = kind(gmem, smem, op, item, done)

        def one_step(place: Array, _: None) -> None:
            @pl.when(place < item.end)
            def _() -> None:
                fetch.keys(place)

            @pl.when((place == item.begin) & (place < item.end))
            def _() -> None:
                _fetch_queries(gmem, smem, op, item, done)

            @pl.when(place > item.begin)
            def _() -> None:
                fetch.values(place - 1)

        lax.fori_loop(item.begin, item.end + 1, one_step, None)
        return done + item.end - item.begin, following

    start = jnp.int32(0), items.describe(jnp.int32(0))
    done, _ = lax.fori_loop(0, items.count, one_item, start)

    @pl.when(done > 0)
    def _() -> None:
        plgpu.barrier_wait(smem.q_free)

    stages = op.config.stages

    @pl.loop(lax.max(done - stages, jnp.int32(0)), done)
    def _(step: Array) -> None:
        stage = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(smem.k_free.at[stage])
        plgpu.barrier_wait(smem.v_free.at[stage])


class _Fetch(NamedTuple):
    """Keys and values of an item's blocks."""

    gmem: Gmem
    smem: Shared
    op: PrefillOp
    item: Item
    done: Array  # blocks of earlier items

    def keys(self, place: Array) -> None:
        _, copy = self._copier(0, self._stage(place), block_at(self.gmem, self.item, place))
        self._wait(self.smem.k_free, place)
        copy(self.smem.k_full.at[self._stage(place)])

    def values(self, place: Array) -> None:
        smem, stage, block_kv = self.smem, self._stage(place), self.op.config.block_kv
        block = block_at(self.gmem, self.item, place)
        count, copy = self._copier(1, stage, block)
        written = self.item.seq_len - block * block_kv
        self._wait(smem.v_free, place)

        @pl.when(written >= block_kv)
        def _() -> None:
            copy(smem.v_full.at[stage])

        @pl.when(written < block_kv)
        def _() -> None:
            copy(smem.v_raw)
            plgpu.barrier_wait(smem.v_raw)
            zero_past(smem.v.at[stage], written)
            for _ in range(count):
                plgpu.barrier_arrive(smem.v_full.at[stage])

    def _copier(self, which: int, stage: Array, block: Array) -> tuple[int, Callable[[Any], None]]:
        """Reads now which pages they are: how many copies it takes, and what starts them once it is
        told their barrier."""
        smem, op = self.smem, self.op
        count, part = _parts(self.gmem, op, self.item, block)
        size = op.config.block_kv // count
        numbers = len(op.variant.token_params) if which == 0 else 0

        def copy(barrier: Any) -> None:
            def copy_part(i: int) -> None:
                rows = (smem.k, smem.v)[which].at[stage, pl.ds(i * size, size)]
                plgpu.copy_gmem_to_smem(part(which, i), rows, barrier)
                for param in range(numbers):
                    target = smem.numbers.at[stage, param, pl.ds(i * size, size)]
                    plgpu.copy_gmem_to_smem(part(_NUMBERS + param, i), target, barrier)

            issue(copy_part, count, op.config.issuers)

        return count, copy

    def _stage(self, place: Array) -> Array:
        return lax.rem(self._step(place), jnp.int32(self.op.config.stages))

    def _step(self, place: Array) -> Array:
        return self.done + place - self.item.begin

    def _wait(self, free: Any, place: Array) -> None:
        """Until the block that was in this block's stage has been multiplied."""

        @pl.when(self._step(place) >= self.op.config.stages)
        def _() -> None:
            plgpu.barrier_wait(free.at[self._stage(place)])


class _FetchNarrow(_Fetch):
    """Of pages of eight bits: they are widened here, while the next are on their way."""

    def keys(self, place: Array) -> None:
        @pl.when(place == self.item.begin)
        def _() -> None:
            self._copy(0, place)
            self._copy(1, place)

        self._take(0, place, None)

    def values(self, place: Array) -> None:
        block = block_at(self.gmem, self.item, place)
        self._take(1, place, self.item.seq_len - block * self.op.config.block_kv)

    def _take(self, which: int, place: Array, written: Array | None) -> None:
        """``written``: tokens of the block that there are, where it matters."""
        smem, size = self.smem, self.op.config.block_kv
        wide, free, full = (
            (smem.v, smem.v_free, smem.v_full) if which else (smem.k, smem.k_free, smem.k_full)
        )
        narrow, target = smem.narrow.at[which], wide.at[self._stage(place)]
        rows = _WIDENED // self.gmem.kv.shape[4]
        self._wait(free, place)
        plgpu.barrier_wait(smem.narrow_full.at[which])
        if written is None:
            widen(narrow, target, rows=rows)
        else:
            pl.when(written >= size)(lambda: widen(narrow, target, rows=rows))
            pl.when(written < size)(lambda: widen(narrow, target, rows=rows, written=written))
        plgpu.commit_smem()
        plgpu.barrier_arrive(full.at[self._stage(place)])

        @pl.when(place + 1 < self.item.end)
        def _() -> None:
            self._copy(which, place + 1)

    def _copy(self, which: int, place: Array) -> None:
        block = block_at(self.gmem, self.item, place)
        count, part = _parts(self.gmem, self.op, self.item, block)
        size = self.op.config.block_kv // count

        def copy_part(i: int) -> None:
            target = self.smem.narrow.at[which, pl.ds(i * size, size)]
            plgpu.copy_gmem_to_smem(part(which, i), target, self.smem.narrow_full.at[which])

        issue(copy_part, count, self.op.config.issuers)


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


def _fetch_queries(gmem: Gmem, smem: Shared, op: PrefillOp, item: Item, done: Array) -> None:
    @pl.when(done > 0)
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
