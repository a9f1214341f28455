"""What computes in prefill over latents: one warpgroup makes weights, two sum values by them.

Half the channels each, because 512 for 64 rows do not fit into the registers of one. While they
sum, the scores of the next block are made. Softmax is online and in base 2 (Milakov & Gimelshein
2018, arXiv:1805.02867).
"""

import functools
import math
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
    Shared,
    my_items,
)
from pallas_kernels.attention.prefill_sm90_items import WGMMA
from pallas_kernels.attention.prefill_tiles import ALIGN, ROWS

_LOG2E = math.log2(math.e)
_FLOOR = -1e30  # start of the running maximum: finite, so that a row without keys stays at zero
# Channels of one product. Threads begin with 128 registers here, and the assembler refuses what
# takes more at once.
_WIDTH = 128
_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def score(gmem: Gmem, smem: Shared, op: LatentOp) -> None:
    """Weights of each block, and by how much they shrink what has been summed so far."""
    mine, read = my_items(gmem, op)
    parts = (*smem.rest(), *smem.halves())  # as they come

    def hand_over(step: Array, decay: Array, weights: Array | None = None) -> None:
        @pl.when(step > 0)
        def _() -> None:
            plgpu.barrier_wait(smem.p_free)

        smem.decay[...] = decay
        if weights is not None:
            smem.p[...] = weights
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem.p_full)

    def one_item(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        done, handed = carry
        item = read(turn)
        plgpu.barrier_wait(smem.q_full)

        def one_block(masked: bool, block: Array, sums: tuple[Array, Array]) -> Any:
            maximum, total = sums
            stage = lax.rem(done + block, jnp.int32(STAGES))

            def multiply(scores: Any) -> Array:
                for part in parts:
                    plgpu.barrier_wait(part.k_full.at[stage])
                    plgpu.wgmma(scores, part.q, part.k.at[stage].transpose((1, 0)))
                return scores[...]

            scores = pl.run_scoped(multiply, _Accumulator((ROWS, BLOCK), jnp.float32))
            for part in smem.rest():
                plgpu.barrier_arrive(part.k_free.at[stage])
            if masked:
                scores = _causal(scores, item.position, block * BLOCK, op.heads)
            factor = op.scale * _LOG2E
            raised = jnp.maximum(maximum, scores.max(axis=1) * factor)
            decay = jnp.exp2(maximum - raised)
            weights = jnp.exp2(scores * factor - _spread(raised, BLOCK))
            total = total * decay + weights.sum(axis=1)
            hand_over(handed + block, decay, weights.astype(smem.p.dtype))
            return raised, total

        sums = _rows(_FLOOR), _rows(0.0)
        sums = lax.fori_loop(0, item.clear, functools.partial(one_block, False), sums)
        sums = lax.fori_loop(item.clear, item.end, functools.partial(one_block, True), sums)
        hand_over(handed + item.end, 1.0 / jnp.maximum(sums[1], 1e-30))
        return done + item.end, handed + item.end + 1

    _, handed = lax.fori_loop(0, mine, one_item, (jnp.int32(0), jnp.int32(0)))

    @pl.when(handed > 0)
    def _() -> None:
        plgpu.barrier_wait(smem.p_free)


def _rows(value: float) -> Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA.reduce(1))


def _spread(rows: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(rows, (ROWS, columns), [0])


def _causal(scores: Array, position: Array, key: Array, heads: int) -> Array:
    """Positions of keys are counted as those of rows are, so that no row is divided by heads."""

    def index(dimension: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, scores.shape, dimension, layout=WGMMA)

    visible = index(1) * heads - index(0) <= position - key * heads
    return jnp.where(visible, scores, -jnp.inf)


def add(gmem: Gmem, smem: Shared, op: LatentOp, half: int) -> None:
    """The weighted sum of half the channels, and its way to memory."""
    mine, read = my_items(gmem, op)
    own = smem.halves()[half]
    width = own.q.shape[1]
    columns = [pl.ds(at, min(_WIDTH, width - at)) for at in range(0, width, _WIDTH)]

    def decayed(sums: tuple[Array, ...]) -> list[Array]:
        decay = plgpu.load(smem.decay, layout=WGMMA.reduce(1))
        return [part * _spread(decay, part.shape[1]) for part in sums]

    def one_item(turn: Array, done: Array) -> Array:
        item = read(turn)

        def one_block(block: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            stage = lax.rem(done + block, jnp.int32(STAGES))
            plgpu.barrier_wait(own.k_full.at[stage])
            plgpu.barrier_wait(smem.p_full)
            values = [own.k.at[stage, :, part] for part in columns]
            sums = _added(smem.p, values, decayed(sums), op.interpret)
            plgpu.barrier_arrive(smem.p_free)
            plgpu.barrier_arrive(own.k_free.at[stage])
            return sums

        zeros = [jnp.zeros((ROWS, part.size), jnp.float32) for part in columns]
        zeros = tuple(plgpu.layout_cast(part, WGMMA) for part in zeros)
        sums = lax.fori_loop(0, item.end, one_block, zeros)
        plgpu.barrier_wait(smem.p_full)
        answers = [part.astype(own.q.dtype) for part in decayed(sums)]
        plgpu.barrier_arrive(smem.p_free)
        plgpu.barrier_wait(smem.q_full)  # nothing may still be on its way to where they go
        for part, answer in zip(columns, answers, strict=True):
            own.q.at[:, part][...] = answer
        plgpu.commit_smem()
        _store(own.q, gmem.out.at[:, own.channels], item)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(smem.q_free)
        return done + item.end

    lax.fori_loop(0, mine, one_item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _added(
    weights: Any, values: list[Any], sums: list[Array], interpret: bool
) -> tuple[Array, ...]:
    if not interpret:

        def multiply(accumulators: tuple[Any, ...]) -> None:
            for accumulator, part in zip(accumulators, values, strict=True):
                plgpu.wgmma(accumulator, weights, part)

        return pl.run_state(multiply)(tuple(map(_Accumulator.init, sums)))

    def product(part: Any, shape: tuple[int, ...]) -> Array:
        """The interpreter has no accumulator that begins with a sum."""

        def multiply(accumulator: Any) -> Array:
            plgpu.wgmma(accumulator, weights, part)
            return accumulator[...]

        return pl.run_scoped(multiply, _Accumulator(shape, jnp.float32))

    pairs = zip(sums, values, strict=True)
    return tuple(part + product(value, part.shape) for part, value in pairs)


def _store(staged: Any, out: Any, item: Item) -> None:
    """The tile's own rows and no other: their neighbours belong to other thread blocks. Heads come
    in eights, so a tile begins and ends at a multiple of 8, as parts of swizzled memory must."""
    whole = item.high - item.low == ROWS

    @pl.when(whole)
    def _() -> None:
        plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(item.row, ROWS)])

    @pl.when(jnp.logical_not(whole))
    def _() -> None:
        start, size = item.low, ROWS // 2
        while size >= ALIGN:  # a transfer's size is static: one per binary digit of their number
            digit = (item.high - item.low) & size

            @pl.when(digit != 0)
            def _(start: Array = start, size: int = size) -> None:
                source = staged.at[pl.ds(pl.multiple_of(start, ALIGN), size)]
                target = out.at[pl.ds(pl.multiple_of(item.row + start, ALIGN), size)]
                plgpu.copy_smem_to_gmem(source, target)

            start, size = start + digit, size // 2
