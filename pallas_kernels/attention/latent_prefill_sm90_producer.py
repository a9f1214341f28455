"""The producer warpgroup of prefill over latents: fetches queries and keys by TMA."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.latent_prefill_sm90_items import (
    BLOCK,
    STAGES,
    Gmem,
    Item,
    LatentOp,
    Part,
    Shared,
    my_items,
)
from pallas_kernels.attention.prefill_sm90_producer import zero_past
from pallas_kernels.attention.prefill_tiles import ROWS


def produce(gmem: Gmem, smem: Shared, op: LatentOp) -> None:
    """Fetches blocks as far ahead as there are stages, across items; the queries of the next item
    once the answers of this one have left their place."""
    mine, read = my_items(gmem, op)

    def fetch_queries(item: Item, turn: Array) -> None:
        @pl.when(turn > 0)
        def _() -> None:
            plgpu.barrier_wait(smem.q_free)

        rows = gmem.q.at[pl.ds(item.row, ROWS)]
        for part in (*smem.rest(), *smem.halves()):
            plgpu.copy_gmem_to_smem(rows.at[:, part.channels], part.q, smem.q_full)

    def one_item(turn: Array, done: Array) -> Array:
        item = read(turn)

        def one_block(block: Array, _: None) -> None:
            _fetch(gmem, smem, item, block, done + block)
            last = lax.min(jnp.int32(STAGES), item.end) - 1
            pl.when(block == last)(lambda: fetch_queries(item, turn))

        lax.fori_loop(jnp.int32(0), item.end, one_block, None)
        pl.when(item.end == 0)(lambda: fetch_queries(item, turn))
        return done + item.end

    done = lax.fori_loop(0, mine, one_item, jnp.int32(0))

    # Every arrival must have been waited for before the barriers go away.
    @pl.when(mine > 0)
    def _() -> None:
        plgpu.barrier_wait(smem.q_free)

    @pl.loop(lax.max(done - STAGES, jnp.int32(0)), done)
    def _(step: Array) -> None:
        for part in (*smem.rest(), *smem.halves()):
            plgpu.barrier_wait(part.k_free.at[lax.rem(step, jnp.int32(STAGES))])


def _fetch(gmem: Gmem, smem: Shared, item: Item, block: Array, step: Array) -> None:
    page = gmem.kv.shape[3]
    count, split = max(BLOCK // page, 1), max(page // BLOCK, 1)
    size, stage = BLOCK // count, lax.rem(step, jnp.int32(STAGES))
    # Past the last page it is fetched again: masked, and no table entry past the end is used.
    last = lax.div(item.length - 1, jnp.int32(page))
    first = lax.div(block, jnp.int32(split)) * count
    pages = [gmem.block_tables[item.slot, lax.min(first + i, last)] for i in range(count)]
    start = lax.rem(block, jnp.int32(split)) * BLOCK if split > 1 else 0

    def copy(part: Part, barrier: Any) -> None:
        for i, number in enumerate(pages):
            source = gmem.kv.at[number, 0, 0, pl.ds(start, size), part.channels]
            plgpu.copy_gmem_to_smem(source, part.k.at[stage, pl.ds(i * size, size)], barrier)

    def wait_for(part: Part) -> None:
        @pl.when(step >= STAGES)
        def _() -> None:
            plgpu.barrier_wait(part.k_free.at[stage])

    for part in smem.rest():
        wait_for(part)
        copy(part, part.k_full.at[stage])
    written = item.length - block * BLOCK
    for part in smem.halves():
        wait_for(part)
        pl.when(written >= BLOCK)(lambda part=part: copy(part, part.k_full.at[stage]))

    @pl.when(written < BLOCK)
    def _() -> None:  # only a value is multiplied with what may be NaN: scores are masked
        for part in smem.halves():
            copy(part, smem.k_raw)
        plgpu.barrier_wait(smem.k_raw)
        for part in smem.halves():
            zero_past(part.k.at[stage], written)
            for _ in pages:
                plgpu.barrier_arrive(part.k_full.at[stage])
