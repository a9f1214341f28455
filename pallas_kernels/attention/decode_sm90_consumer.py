"""The consumer warpgroup of the decode kernel: scores, softmax, weighted values.

Tiles are [tokens, heads] for scores and [dim, heads] for sums. Softmax is online and in base 2.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.decode_sm90_items import DecodeShape, Item, Walk, whole_tile
from pallas_kernels.attention.decode_sm90_latents import shared_scores
from pallas_kernels.attention.decode_sm90_sums import (
    LOG2E,
    MASKED,
    WGMMA,
    Ref,
    Sum,
    across,
    empty_sum,
    filled,
    join,
    power_of_two,
    store_answer,
    store_stats,
    store_values,
    whole,
)
from pallas_kernels.attention.decode_sm90_turns import Reductions
from pallas_kernels.attention.decode_sm90_variant import DecodeMods
from pallas_kernels.attention.widen_sm90 import widen

_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


class Outputs(NamedTuple):
    answers: Ref  # [R, K, N, D]
    values: Ref = None  # [S, K, D, N] partial sums; None where no row can have several items
    stats: Ref = None  # [S, K, 2, N]


def consume(
    walk: Walk,
    counts: Ref,
    params: tuple[Ref, ...],
    out: Outputs,
    smem: dict[str, Ref],
    consumer: Array,
    own: tuple[Ref, Ref] | None = None,
) -> None:
    """``own``: pages of per_token params and block tables, where the query's own numbers lie."""
    shape, op = walk.shape, walk.op
    chunk_splits = op.config.splits_per_chunk
    nothing = functools.partial(empty_sum, shape.columns, shape.padded)
    columns = shape.columns_of(consumer)
    if shape.is_latent:
        smem = smem | {name: smem[name].at[consumer] for name in ("p", "out")}
    reductions = Reductions(smem.get("turn"), consumer)
    splits_per_partial = counts[1]

    def leave(item: Item, slot: Array, wanted: Array, partial: Sum) -> None:
        if out.values is None:
            return

        @pl.when(wanted & (item.slot >= 0))
        def _() -> None:
            where = (item.slot + slot, item.head)
            store_values(out.values.at[*where, *columns], partial)
            if shape.is_latent:  # both consumers know the rest
                pl.when(consumer == 0)(lambda: store_stats(out.stats.at[*where], partial))
            else:
                store_stats(out.stats.at[*where], partial)

    def one_item(turn: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, description = carry
        item = walk.item(description)
        following = walk.describe(turn + 1)
        query = lax.rem(turn, jnp.int32(shape.query_slots))
        mods = DecodeMods(op, shape, params, item, own)
        plgpu.barrier_wait(smem["q_full"].at[query])

        def one_split(split: Array, carry: tuple[Array, Sum]) -> tuple[Array, Sum]:
            step, chunk = carry
            given = (walk, item, mods, smem, query, consumer, reductions)
            block = functools.partial(_one_block, *given)
            step, part = _sum_split(walk, item, block, reductions, split, step)
            leave(item, split - item.first_split, splits_per_partial == 1, part)
            return step, join(chunk, part)

        first_chunk = lax.div(item.first_split, jnp.int32(chunk_splits))
        end_chunk = lax.div(item.end_split + (chunk_splits - 1), jnp.int32(chunk_splits))

        def one_chunk(chunk: Array, carry: tuple[Array, Sum]) -> tuple[Array, Sum]:
            step, row = carry
            first = lax.max(chunk * chunk_splits, item.first_split)
            end = lax.min((chunk + 1) * chunk_splits, item.end_split)
            step, part = lax.fori_loop(first, end, one_split, (step, nothing()))
            leave(item, chunk - first_chunk, splits_per_partial > 1, part)
            return step, join(row, part)

        step, row = lax.fori_loop(first_chunk, end_chunk, one_chunk, (step, nothing()))
        plgpu.barrier_arrive(smem["q_free"].at[query])

        @pl.when(item.slot < 0)
        def _() -> None:
            heads = whole_tile(shape.padded)
            answer = row if mods.sink is None else join(row, mods.sink)
            where = out.answers.at[item.row, item.head, heads, *columns]
            store_answer(answer, smem["out"], where)

        return step, following

    start = (jnp.int32(0), walk.describe(jnp.int32(0)))
    lax.fori_loop(0, walk.count, one_item, start)
    plgpu.wait_smem_to_gmem(0)
    reductions.end()


def _sum_split(
    walk: Walk,
    item: Item,
    one_block: Callable[[Array, Any], Any],
    reductions: Reductions,
    split: Array,
    step: Array,
) -> tuple[Array, Sum]:
    shape, heads = walk.shape, walk.shape.padded
    first, end = item.blocks(walk.op, shape.block, split, split + 1)
    state = (
        step,
        filled((shape.columns, heads), 0.0),
        filled((shape.block, heads), 0.0),
        filled((heads,), MASKED),
    )
    if walk.op.variant.is_mapped:
        state = (*state, walk.block_at(item, first))
    step, values, total, maximum, *_ = lax.fori_loop(first, end, one_block, state)
    return step, Sum(values, reductions.over_tokens(jnp.sum, total), maximum)


def _one_block(
    walk: Walk,
    item: Item,
    mods: DecodeMods,
    smem: dict[str, Ref],
    query: Array,
    consumer: Array,
    reductions: Reductions,
    place: Array,
    carry: Any,
) -> Any:
    shape, op, heads = walk.shape, walk.op, walk.shape.padded
    step, accumulated, total, maximum, *found = carry
    block, following = (found[0], [walk.block_at(item, place + 1)]) if found else (place, [])
    stage = lax.rem(step, jnp.int32(op.config.stages))
    position = block * shape.block  # of the block's first token

    def take(name: str) -> Ref:
        """Keys or values of the block, as they are multiplied."""
        plgpu.barrier_wait(smem[f"{name}_full"].at[stage])
        if not shape.widens:
            return smem[name].at[stage]
        widen(smem[name].at[stage], smem[f"wide_{name}"])
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem[f"{name}_free"].at[stage])
        return smem[f"wide_{name}"]

    keys = take("k")

    def keys_by_queries(result: Ref) -> Array:
        plgpu.wgmma(result, keys, smem["q"].at[query].transpose((1, 0)))
        if shape.widens:  # under the multiplication
            take("v")
        return result[...]

    if shape.shares_scores:
        scores = shared_scores(shape, smem, keys, smem["q"].at[query], consumer, step)
    else:
        scores = pl.run_scoped(keys_by_queries, _Accumulator((shape.block, heads), jnp.float32))
    numbers = [
        plgpu.load(smem["numbers"].at[stage, param], layout=WGMMA.reduce(1))
        for param in range(shape.numbers)
    ]
    if not shape.widens and not shape.is_latent:
        plgpu.barrier_arrive(smem["k_free"].at[stage])
    scores = _logits(walk, item, mods, position, scores, numbers)

    # A block always has a visible token, so the maximum is a real logit and exp2 of a masked one 0;
    # where a variant hides all of it the maximum is the least int32, far above a masked one.
    # It is kept whole: then every decay is exact (decode_sm90_sums.py).
    raised = jnp.maximum(maximum, whole(reductions.over_tokens(jnp.max, scores)))
    decay = power_of_two(maximum - raised)
    weights = jnp.exp2(scores - across(raised, scores))
    # What is summed is what is multiplied, rounded: a token seen alone has its very value.
    weights = weights.astype(shape.dtype)
    total = total * across(decay, total) + weights.astype(jnp.float32)
    smem["p"].transpose((1, 0))[...] = plgpu.layout_cast(weights, _TRANSPOSED)

    if shape.is_latent:
        tile = keys.at[:, *shape.columns_of(consumer)]
    else:
        tile = smem["wide_v"] if shape.widens else take("v")

    # Pages are reused without being cleared, and 0 * NaN is NaN.
    @pl.when(position + shape.block > item.length)
    def _() -> None:
        _clear_tail(shape, tile, item.length - position)

    plgpu.commit_smem()

    def values_by_weights(result: Ref) -> Array:
        plgpu.wgmma(result, tile.transpose((1, 0)), smem["p"].transpose((1, 0)))
        return result[...]

    added = pl.run_scoped(values_by_weights, _Accumulator((shape.columns, heads), jnp.float32))
    if not shape.widens:
        plgpu.barrier_arrive(smem["k_free" if shape.is_latent else "v_free"].at[stage])
    accumulated = accumulated * across(decay, accumulated) + added
    return step + 1, accumulated, total, raised, *following


def _logits(
    walk: Walk,
    item: Item,
    mods: DecodeMods,
    position: Array,
    scores: Array,
    numbers: list[Array],
) -> Array:
    """To base 2, where exp2 is one instruction; what the query does not see is masked."""
    op, variant = walk.op, walk.op.variant
    scores = scores * (op.scale * LOG2E if variant.score_mod is None else op.scale)
    token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=WGMMA) + position
    scores, seen = mods(scores, token, position, numbers)
    if variant.score_mod is not None:
        scores = scores * LOG2E
    visible = token < item.length
    if op.window is not None or item.first is not None:
        visible = visible & (token >= item.begin(op))
    if seen is not None:
        visible = visible & seen
    return jnp.where(visible, scores, MASKED)


def _clear_tail(shape: DecodeShape, values: Ref, tokens: Array) -> None:
    """Zeroes all but the first ``tokens`` rows of a block, a tile at a time to spare registers."""
    for row in range(0, shape.block, 64):
        index = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=WGMMA) + row
        for column in range(0, shape.columns, 64):
            tile = values.at[pl.ds(row, 64), pl.ds(column, 64)]
            old = plgpu.load(tile, layout=WGMMA)
            tile[...] = jnp.where(index < tokens, old, jnp.zeros((), shape.dtype))
