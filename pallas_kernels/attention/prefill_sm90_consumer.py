"""A consumer warpgroup of the prefill kernel: 64 query rows against all their keys.

The two consumers alternate between tensor cores and exponentials as in FlashAttention-3
(Shah et al. 2024, arXiv:2407.08608). Softmax is online and in base 2.
"""

import functools
from collections.abc import Callable
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
    block_at,
    ceil_div,
    my_items,
    rows_and_head,
)
from pallas_kernels.attention.prefill_sm90_store import store
from pallas_kernels.attention.prefill_sm90_variant import PrefillMods
from pallas_kernels.attention.prefill_tiles import ROWS

_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_Sums = tuple[Array, Array, Array]  # weighted values [ROWS, D], maximum and total [ROWS]
_FLOOR = -1e30  # start of the running maximum: finite, so that a row without keys stays at zero


def consume(gmem: Gmem, smem: Shared, op: PrefillOp, consumer: Array) -> None:
    mine, read = my_items(gmem, op)

    def one_item(turn: Array, done: Array) -> Array:
        item = read(turn)
        result = _attend(gmem, smem, op, item, consumer, done)
        store(gmem, smem, op, item, consumer, result)
        return done + item.end - item.begin

    if op.config.take_turns:  # consumer 1 stays half a step behind
        pl.when(consumer == 1)(lambda: _meet(smem))
    lax.fori_loop(0, mine, one_item, jnp.int32(0))
    if op.config.take_turns:
        pl.when(consumer == 0)(lambda: _meet(smem))
    plgpu.wait_smem_to_gmem(0)


def _meet(smem: Shared) -> None:
    plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(smem.turn)


def _spread(rows: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(rows, (ROWS, columns), [0])


def _attend(
    gmem: Gmem, smem: Shared, op: PrefillOp, item: Item, consumer: Array, done: Array
) -> Array:
    """The consumer's 64 rows of attention output, float32."""
    dim, config = smem.q.shape[2], op.config
    row, head = rows_and_head(item, consumer, config)
    mods = PrefillMods(op, gmem, item, head, row)
    low, high = lax.max(item.low, row), lax.min(item.high, row + ROWS)
    step = functools.partial(_step, smem, op, mods, consumer, item.position + row, done)

    @pl.when(item.end > item.begin)
    def _() -> None:
        plgpu.barrier_wait(smem.q_full)
        plgpu.barrier_wait(smem.k_full.at[lax.rem(done, jnp.int32(config.stages))])

    # Blocks that every row sees whole need no mask: those up to the first row's own position,
    # and with a window those from the last row's oldest key on.
    clear_end = lax.div(item.position + low + 1, jnp.int32(config.block_kv))
    clear_end = lax.clamp(item.begin, clear_end, item.end)
    clear_begin = item.begin
    if op.variant.is_mapped:
        return _attend_mapped(gmem, step, mods, dim)
    if op.variant.mask_mod is not None or op.ranged:
        clear_end = item.begin  # none is known to be seen whole
    elif op.window is not None:
        oldest = lax.max(item.position + high - op.window, jnp.int32(0))
        clear_begin = lax.clamp(item.begin, ceil_div(oldest, config.block_kv), item.end)
        clear_end = lax.max(clear_begin, clear_end)

    carry = _nothing(dim)
    if clear_begin is not item.begin:
        carry = lax.fori_loop(item.begin, clear_begin, functools.partial(step, True), carry)
    if clear_end is not item.begin:
        carry = lax.fori_loop(clear_begin, clear_end, functools.partial(step, False), carry)
    carry = lax.fori_loop(clear_end, item.end, functools.partial(step, True), carry)
    return _answer(mods, carry, dim)


def _attend_mapped(gmem: Gmem, step: Callable[..., _Sums], mods: PrefillMods, dim: int) -> Array:
    """Blocks that are seen in part, then those seen whole, where nothing asks the mask. Which they
    are is read one step before it is needed."""
    item = mods.item

    def walk(masked: bool, place: Array, carry: tuple[Array, _Sums]) -> tuple[Array, _Sums]:
        block, sums = carry
        following = block_at(gmem, item, place + 1)
        return following, step(masked, place, sums, block)

    carry = (block_at(gmem, item, item.begin), _nothing(dim))
    carry = lax.fori_loop(item.begin, item.whole, functools.partial(walk, True), carry)
    carry = lax.fori_loop(item.whole, item.end, functools.partial(walk, False), carry)
    return _answer(mods, carry[1], dim)


def _nothing(dim: int) -> _Sums:
    def rows(value: float) -> Array:
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA.reduce(1))

    zeros = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), WGMMA)
    return zeros, rows(_FLOOR), rows(0.0)


def _answer(mods: PrefillMods, sums: _Sums, dim: int) -> Array:
    accumulated, total = mods.add_sink(*sums)
    return accumulated * _spread(1.0 / jnp.maximum(total, 1e-30), dim)


def _step(
    smem: Shared,
    op: PrefillOp,
    mods: PrefillMods,
    consumer: Array,
    position: Array,
    done: Array,
    masked: bool,
    place: Array,
    carry: _Sums,
    block: Array | None = None,
) -> _Sums:
    """One block of keys: scores, softmax update, weighted values. ``block``: which, if not the one
    at ``place``."""
    accumulated, maximum, total = carry
    config, stages, item = op.config, jnp.int32(op.config.stages), mods.item
    block = place if block is None else block
    step = done + place - item.begin
    stage = lax.rem(step, stages)

    def multiply(scores: Any) -> Array:
        plgpu.wgmma(scores, smem.q.at[consumer], smem.k.at[stage].transpose((1, 0)))
        if config.take_turns:
            _meet(smem)
        return scores[...]

    scores = pl.run_scoped(multiply, _Accumulator((ROWS, config.block_kv), jnp.float32))
    numbers = [
        plgpu.load(smem.numbers.at[stage, param], layout=WGMMA.reduce(0))
        for param in range(len(op.variant.token_params))
    ]
    plgpu.barrier_arrive(smem.k_free.at[stage])

    @pl.when(place == item.end - 1)
    def _() -> None:
        plgpu.barrier_arrive(smem.q_free)

    scores, factor, shift = mods.score(scores, position, block * config.block_kv, numbers)
    if masked:
        scores = _masked(scores, position, block * config.block_kv, op, mods, numbers)
    # The maximum is kept in scaled units, so that exp2's argument is one multiply-add.
    top = scores.max(axis=1) * factor
    new_maximum = jnp.maximum(maximum, top if shift is None else top + shift)
    decay = jnp.exp2(maximum - new_maximum)
    base = new_maximum if shift is None else new_maximum - shift
    weights = jnp.exp2(scores * factor - _spread(base, config.block_kv))
    accumulated *= _spread(decay, accumulated.shape[1])
    narrow = weights.astype(smem.v.dtype)
    total = total * decay + weights.sum(axis=1)
    # Keeps the compiler from moving softmax arithmetic past the barriers.
    accumulated, total, new_maximum, narrow = lax.optimization_barrier(
        (accumulated, total, new_maximum, narrow)
    )
    if config.take_turns:
        plgpu.barrier_arrive(smem.turn)
    plgpu.barrier_wait(smem.v_full.at[stage])
    if config.take_turns:
        plgpu.barrier_wait(smem.turn)

    next_stage, end = lax.rem(step + 1, stages), item.end  # Mosaic rejects literals in a closure

    def wait_for_next_keys() -> None:
        @pl.when(place + 1 < end)
        def _() -> None:
            plgpu.barrier_wait(smem.k_full.at[next_stage])

    accumulated = _add_values(smem, consumer, stage, narrow, accumulated, wait_for_next_keys)
    plgpu.barrier_arrive(smem.v_free.at[stage])
    return accumulated, new_maximum, total


def _masked(
    scores: Array,
    position: Array,
    key: Array,
    op: PrefillOp,
    mods: PrefillMods,
    numbers: list[Array],
) -> Array:
    """The mask of the variant and the causal one, each where it hides anything of the block."""
    mask_mod = op.variant.mask_mod
    if mask_mod is None:
        return _causal(scores, position, key, op, mods.item.seq_len)

    def by_variant(scores: Array) -> Array:
        seen = mods.seen(scores.shape, position, key, numbers)
        return jnp.where(seen, scores, -jnp.inf)

    whole = mods.seen_whole(position, key)
    scores = by_variant(scores) if whole is None else _unless(whole, by_variant, scores)
    past = mods.is_past(position, key)
    return _unless(
        past, lambda scores: _causal(scores, position, key, op, mods.item.seq_len), scores
    )


def _unless(condition: Array, function: Callable[[Array], Array], scores: Array) -> Array:
    return lax.cond(condition, lambda scores: scores, function, scores)


def _causal(scores: Array, position: Array, key: Array, op: PrefillOp, length: Array) -> Array:
    def index(dimension: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, scores.shape, dimension, layout=WGMMA)

    ahead = index(1) - index(0) + (key - position)  # key position minus query position
    visible = index(1) + key < length if op.variant.lookahead else ahead <= 0
    if op.window is not None:
        visible &= ahead > -op.window
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
    values = smem.v.at[stage]
    if smem.p is None:

        def multiply(accumulator: Any) -> None:
            plgpu.wgmma(accumulator, weights, values)
            meanwhile()

        return pl.run_state(multiply)(_Accumulator.init(accumulated))
    staged = smem.p.at[consumer]
    staged[...] = weights
    plgpu.commit_smem()

    def staged_multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, staged, values)
        return accumulator[...]

    added = pl.run_scoped(staged_multiply, _Accumulator(accumulated.shape, jnp.float32))
    meanwhile()
    return accumulated + added
