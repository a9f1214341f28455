"""The producer warpgroup of the decode kernel: fetches queries, keys and values by TMA."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.decode_sm90_items import Item, Walk, whole_tile
from pallas_kernels.attention.decode_sm90_sums import Ref


def issue(copy: Callable[[int], None], count: int, warps: int) -> None:
    """Starts ``count`` copies. A warpgroup meets before each and arrives with all its lanes: little
    beside the 16 KiB of a large page, but not beside the 4 KiB of one of 16 tokens. Warps by
    themselves meet before the first and after the last only."""
    if warps == 1 or count == 1:
        for i in range(count):
            copy(i)
        return

    @plgpu.warp_map
    def _(warp: Array) -> None:
        for i in range(count):
            pl.when(warp == i % warps)(functools.partial(copy, i))


def produce(
    walk: Walk, q: Ref, kv: Ref, tables: Ref, smem: dict[str, Ref], tokens: Ref = None
) -> None:
    """Runs ahead of the consumer by as many blocks as the ring has stages, across items. Page
    numbers and items are read one step before they are needed. ``tokens``: pages of a variant's
    per_token params, which travel with the keys."""
    shape, op, stages = walk.shape, walk.op, walk.op.config.stages
    slots = shape.query_slots

    def pages_of(item: Item, block: Array) -> tuple[Array, ...]:
        # Pages that the query does not see at all may belong to others: the nearest that it sees
        # is fetched again, and masked.
        first = lax.div(item.begin(op), jnp.int32(shape.page))
        last = lax.div(item.length - 1, jnp.int32(shape.page))
        if shape.blocks_per_page == 1:
            start = block * shape.pages_per_block
        else:
            start = lax.div(block, jnp.int32(shape.blocks_per_page))
        return tuple(
            tables[item.row, lax.clamp(first, start + i, lax.max(first, last))]
            for i in range(shape.pages_per_block)
        )

    def tokens_of(page: Array, kind: int, head: Array, block: Array) -> Ref:
        if shape.blocks_per_page == 1:
            return kv.at[page, kind, head]
        part = lax.rem(block, jnp.int32(shape.blocks_per_page))
        return kv.at[page, kind, head, pl.ds(part * shape.block, shape.block)]

    def numbers_of(page: Array, param: int, head: Array, block: Array) -> Ref:
        if shape.blocks_per_page == 1:
            return tokens.at[page, param, head]
        part = lax.rem(block, jnp.int32(shape.blocks_per_page))
        return tokens.at[page, param, head, pl.ds(part * shape.block, shape.block)]

    def copy(
        kind: int, name: str, head: Array, block: Array, pages: tuple[Array, ...], step: Array
    ) -> None:
        """All copies of a stage arrive at one barrier."""
        stage = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _() -> None:
            plgpu.barrier_wait(smem[f"{name}_free"].at[stage])

        size = shape.block // shape.pages_per_block

        def copy_page(i: int) -> None:
            target = smem[name].at[stage, pl.ds(i * size, size)]
            barrier = smem[f"{name}_full"].at[stage]
            plgpu.copy_gmem_to_smem(tokens_of(pages[i], kind, head, block), target, barrier)
            for param in range(shape.numbers if kind == 0 else 0):
                numbers = smem["numbers"].at[stage, param, pl.ds(i * size, size)]
                plgpu.copy_gmem_to_smem(numbers_of(pages[i], param, head, block), numbers, barrier)

        issue(copy_page, len(pages), op.config.issuers)

    def one_item(turn: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, description = carry
        item = walk.item(description)
        following = walk.describe(turn + 1)
        slot = lax.rem(turn, jnp.int32(slots))

        @pl.when(turn >= slots)
        def _() -> None:
            plgpu.barrier_wait(smem["q_free"].at[slot])

        heads = q.at[item.row, item.head, whole_tile(shape.padded)]
        plgpu.copy_gmem_to_smem(heads, smem["q"].at[slot], smem["q_full"].at[slot])

        def one_block(block: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            step, pages, *listed = carry
            next_block = walk.block_at(item, block + 1)
            ahead = pages_of(item, next_block)
            here = listed[0] if listed else block
            if shape.is_latent:
                copy(0, "k", jnp.int32(0), here, pages, step)
            else:
                copy(0, "k", item.head, here, pages, step)
                copy(1, "v", item.head, here, pages, step)
            return step + 1, ahead, *([next_block] if listed else [])

        first, end = item.blocks(op, shape.block, item.first_split, item.end_split)
        first_block = walk.block_at(item, first)
        listed = (first_block,) if op.variant.is_mapped else ()
        state = (step, pages_of(item, first_block), *listed)
        step = lax.fori_loop(first, end, one_block, state)[0]
        return step, following

    start = (jnp.int32(0), walk.describe(jnp.int32(0)))
    steps, _ = lax.fori_loop(0, walk.count, one_item, start)

    # Every arrival must have been waited for before the barriers go away.
    @pl.loop(0, lax.min(steps, jnp.int32(stages)))
    def _(stage: Array) -> None:
        plgpu.barrier_wait(smem["k_free"].at[stage])
        if not shape.is_latent:
            plgpu.barrier_wait(smem["v_free"].at[stage])

    @pl.loop(0, lax.min(walk.count, jnp.int32(slots)))
    def _(slot: Array) -> None:
        plgpu.barrier_wait(smem["q_free"].at[slot])
