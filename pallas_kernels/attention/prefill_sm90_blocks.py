"""One block of keys and values in a consumer of the prefill kernel. Softmax is online and in base
2 (Milakov & Gimelshein 2018, arXiv:1805.02867).

What is asynchronous here was read in the machine code (scripts/assemble_kernels.sh; ptxas 12.9,
13.0 and 13.5): a step is the product of keys, that of values, softmax, and the wait for the second,
and nothing in between writes a register that they read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.prefill_sm90_items import WGMMA, PrefillOp, Shared
from pallas_kernels.attention.prefill_sm90_variant import PrefillMods
from pallas_kernels.attention.prefill_tiles import ROWS

_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
_FLOOR = -1e30  # start of the running maximum: finite, so that a row without keys stays at zero


class Turns:
    """Whose products come next. Both consumers take equally many turns, the first one first."""

    def __init__(self, turn: Any, consumer: Array):
        """``turn``: a barrier for each; None: they do not wait for each other."""
        self._turn, self._consumer = turn, consumer
        if turn is not None:
            pl.when(consumer == 1)(self.leave)

    def take(self) -> None:
        if self._turn is not None:
            plgpu.barrier_wait(self._turn.at[self._consumer])

    def leave(self) -> None:
        if self._turn is not None:
            plgpu.barrier_arrive(self._turn.at[1 - self._consumer])

    def end(self) -> None:
        """Every arrival must have been waited for before the barriers go away."""
        if self._turn is not None:
            pl.when(self._consumer == 0)(self.take)


class Sums(NamedTuple):
    """Of the blocks so far."""

    values: Array  # [ROWS, D] weighted, float32; those of the last block are still missing
    weights: Any  # [ROWS, block_kv] of the last block, as they are multiplied
    maximum: Array  # [ROWS] in scaled units, so that exp2's argument is one multiply-add
    total: Array  # [ROWS]


class Blocks(NamedTuple):
    """The steps of one item, one more than it has blocks: each multiplies the keys of a block and
    the values of the block before."""

    smem: Shared
    op: PrefillOp
    mods: PrefillMods
    consumer: Array
    turns: Turns
    position: Array  # of the first row
    done: Array  # blocks of earlier items

    def first(self, block: Array, is_whole: Array | bool) -> Sums:
        """``is_whole``: whether every row sees all of the block."""
        place = self.mods.item.begin
        stage = self._stage(place)
        plgpu.barrier_wait(self.smem.k_full.at[stage])

        def multiply(scores: Any) -> Array:
            plgpu.wgmma(scores, *self._queries_and_keys(stage))
            self.turns.leave()
            return scores[...]

        self.turns.take()
        scores = pl.run_scoped(multiply, self._scores())
        before = Sums(nothing(self.smem.q.shape[2]), None, _rows(_FLOOR), _rows(0.0))
        sums, _ = self._softmax(is_whole, place, block, before, scores)
        return sums._replace(weights=sums.weights.astype(self.smem.v.dtype))

    def next(self, masked: bool, place: Array, sums: Sums, block: Array) -> Sums:
        """``place`` of the block in the item's list, where it is not the first."""
        stage = self._stage(place)
        plgpu.barrier_wait(self.smem.k_full.at[stage])

        def multiply(scores: Any) -> tuple[tuple[Sums, Array], Array]:
            def softmax() -> tuple[Sums, Array]:
                made = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                return self._softmax(not masked, place, block, sums, made)

            plgpu.wgmma(scores, *self._queries_and_keys(stage))
            return self._add_values(sums, self._stage(place - 1), softmax)

        self.turns.take()
        (made, decay), values = pl.run_scoped(multiply, self._scores())
        # The weights before are read until now: no register of theirs may be written earlier.
        weights, values = lax.optimization_barrier((made.weights, values))
        weights = weights.astype(self.smem.v.dtype)
        return made._replace(values=values * spread(decay, values.shape[1]), weights=weights)

    def last(self, sums: Sums) -> tuple[Array, Array, Array]:
        """All weighted values, maximum and total."""
        self.turns.take()
        stage = self._stage(self.mods.item.end - 1)
        _, values = self._add_values(sums, stage, lambda: None)
        return values, sums.maximum, sums.total

    def _stage(self, place: Array) -> Array:
        step = self.done + place - self.mods.item.begin
        return lax.rem(step, jnp.int32(self.op.config.stages))

    def _scores(self) -> Any:
        return _Accumulator((ROWS, self.op.config.block_kv), jnp.float32)

    def _queries_and_keys(self, stage: Array) -> tuple[Any, Any]:
        return self.smem.q.at[self.consumer], self.smem.k.at[stage].transpose((1, 0))

    def _add_values(
        self, sums: Sums, stage: Array, meanwhile: Callable[[], Any]
    ) -> tuple[Any, Array]:
        """What ``meanwhile`` returns, and the sum with the values of the last block, multiplied
        while it runs."""
        smem = self.smem

        def multiply(added: Any) -> tuple[Any, Array]:
            weights = sums.weights
            if smem.p is None:
                added[...] = sums.values
            else:
                weights = smem.p.at[self.consumer]
                weights[...] = sums.weights
                plgpu.commit_smem()
            plgpu.wgmma(added, weights, smem.v.at[stage])
            self.turns.leave()
            return meanwhile(), added[...]

        done, values = pl.run_scoped(multiply, _Accumulator(sums.values.shape, jnp.float32))
        plgpu.barrier_arrive(smem.v_free.at[stage])
        return done, values if smem.p is None else values + sums.values

    def _softmax(
        self, is_whole: Array | bool, place: Array, block: Array, sums: Sums, scores: Array
    ) -> tuple[Sums, Array]:
        """Weights, and by how much earlier values shrink."""
        smem, op, stage = self.smem, self.op, self._stage(place)
        key = block * op.config.block_kv
        numbers = [
            plgpu.load(smem.numbers.at[stage, param], layout=WGMMA.reduce(0))
            for param in range(len(op.variant.token_params))
        ]
        plgpu.barrier_arrive(smem.k_free.at[stage])

        @pl.when(place == self.mods.item.end - 1)
        def _() -> None:
            plgpu.barrier_arrive(smem.q_free)

        scores, factor, shift = self.mods.score(scores, self.position, key, numbers)
        if is_whole is not True:

            def mask(scores: Array) -> Array:
                return _masked(scores, self.position, key, op, self.mods, numbers)

            scores = mask(scores) if is_whole is False else _unless(is_whole, mask, scores)
        top = scores.max(axis=1) * factor
        maximum = jnp.maximum(sums.maximum, top if shift is None else top + shift)
        decay = jnp.exp2(sums.maximum - maximum)
        base = maximum if shift is None else maximum - shift
        weights = jnp.exp2(scores * factor - spread(base, op.config.block_kv))
        total = sums.total * decay + weights.sum(axis=1)
        # Compilers move no arithmetic past the first and no wait for a product past the second.
        weights, maximum, total, decay = lax.optimization_barrier((weights, maximum, total, decay))
        plgpu.barrier_wait(smem.v_full.at[stage])
        return Sums(sums.values, weights, maximum, total), decay


def spread(rows: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(rows, (ROWS, columns), [0])


def nothing(dim: int) -> Array:
    """Weighted values of no block."""
    return plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), WGMMA)


def _rows(value: float) -> Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA.reduce(1))


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
