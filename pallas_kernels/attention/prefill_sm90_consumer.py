"""A consumer warpgroup of the prefill kernel: 64 query rows against all their keys.

As in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) the two consumers take turns at the
tensor cores, and each multiplies the keys of one block and the values of the block before at once:
exponentials are taken under products, its own and the other's.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.prefill_sm90_blocks import Blocks, Sums, Turns, nothing, spread
from pallas_kernels.attention.prefill_sm90_items import (
    Gmem,
    Items,
    PrefillOp,
    Shared,
    block_at,
    ceil_div,
    rows_and_head,
)
from pallas_kernels.attention.prefill_sm90_store import store
from pallas_kernels.attention.prefill_sm90_variant import PrefillMods
from pallas_kernels.attention.prefill_tiles import ROWS


def consume(gmem: Gmem, smem: Shared, op: PrefillOp, consumer: Array) -> None:
    items = Items(gmem, op)
    turns = Turns(smem.turn if op.config.take_turns else None, consumer)

    def one_item(turn: Array, carry: tuple[Array, tuple[Array, ...]]) -> Any:
        done, description = carry
        item, following = items.item(description), items.describe(turn + 1)
        row, head = rows_and_head(item, consumer, op.config)
        mods = PrefillMods(op, gmem, item, head, row)
        result = _attend(gmem, Blocks(smem, op, mods, consumer, turns, item.position + row, done))
        store(gmem, smem, op, item, consumer, result)
        return done + item.end - item.begin, following

    start = jnp.int32(0), items.describe(jnp.int32(0))
    lax.fori_loop(0, items.count, one_item, start)
    turns.end()
    plgpu.wait_smem_to_gmem(0)


def _attend(gmem: Gmem, blocks: Blocks) -> Array:
    """The consumer's 64 rows of attention output, float32."""
    smem, mods, item = blocks.smem, blocks.mods, blocks.mods.item

    def attended() -> Array:
        plgpu.barrier_wait(smem.q_full)
        walk = _walk_list if blocks.op.variant.is_mapped else _walk
        values, maximum, total = blocks.last(walk(gmem, blocks))
        values, total = mods.add_sink(values, maximum, total)
        return values * spread(1.0 / jnp.maximum(total, 1e-30), values.shape[1])

    return lax.cond(item.end > item.begin, attended, lambda: nothing(smem.q.shape[2]))


def _walk(_: Gmem, blocks: Blocks) -> Sums:
    """All blocks of an item, one after the other."""
    begin, end, second = blocks.mods.item.begin, blocks.mods.item.end, blocks.mods.item.begin + 1
    clear_begin, clear_end = _seen_whole(blocks)
    some_clear = clear_end is not begin
    first_clear = some_clear and (clear_begin <= begin) & (begin < clear_end)
    sums = blocks.first(begin, first_clear)

    def step(masked: bool, block: Array, sums: Sums) -> Sums:
        return blocks.next(masked, block, sums, block)

    if clear_begin is not begin:
        sums = lax.fori_loop(second, clear_begin, functools.partial(step, True), sums)
    if some_clear:
        clear = lax.max(clear_begin, second)
        sums = lax.fori_loop(clear, clear_end, functools.partial(step, False), sums)
    return lax.fori_loop(lax.max(clear_end, second), end, functools.partial(step, True), sums)


def _seen_whole(blocks: Blocks) -> tuple[Array, Array]:
    """First and last + 1 block that every row sees whole, so that they need no mask: those up to
    the first row's own position, and with a window those from the last row's oldest key on."""
    op, item = blocks.op, blocks.mods.item
    begin, end, block_kv = item.begin, item.end, op.config.block_kv
    if op.variant.mask_mod is not None or op.ranged:
        return begin, begin  # none is known to be
    row, _ = rows_and_head(item, blocks.consumer, op.config)
    low, high = lax.max(item.low, row), lax.min(item.high, row + ROWS)
    clear_end = lax.div(item.position + low + 1, jnp.int32(block_kv))
    clear_end = lax.clamp(begin, clear_end, end)
    if op.window is None:
        return begin, clear_end
    oldest = lax.max(item.position + high - op.window, jnp.int32(0))
    clear_begin = lax.clamp(begin, ceil_div(oldest, block_kv), end)
    return clear_begin, lax.max(clear_begin, clear_end)


def _walk_list(gmem: Gmem, blocks: Blocks) -> Sums:
    """Blocks that are seen in part, then those seen whole, where nothing asks the mask. Which they
    are is read one step before it is needed."""
    item, second = blocks.mods.item, blocks.mods.item.begin + 1

    def step(masked: bool, place: Array, carry: tuple[Array, Sums]) -> tuple[Array, Sums]:
        block, sums = carry
        following = block_at(gmem, item, place + 1)
        return following, blocks.next(masked, place, sums, block)

    first, following = (block_at(gmem, item, place) for place in (item.begin, second))
    carry = following, blocks.first(first, item.whole == item.begin)
    carry = lax.fori_loop(second, item.whole, functools.partial(step, True), carry)
    whole = lax.max(item.whole, second)
    return lax.fori_loop(whole, item.end, functools.partial(step, False), carry)[1]
