"""The device code of prefill over latents: four warpgroups, each with its own part of the work.

One fetches queries and latents. One multiplies them to scores and makes weights of these, and two
sum values by those weights, half the channels each: a whole row of 512 does not fit into the
registers of one. While they sum, the scores of the next block are made. Softmax is online and in
base 2 (Milakov & Gimelshein 2018, arXiv:1805.02867).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.prefill_sm90_items import WGMMA, ceil_div
from pallas_kernels.attention.prefill_sm90_producer import zero_past
from pallas_kernels.attention.prefill_tiles import ALIGN, ROWS

BLOCK = 64  # keys per step
_LOG2E = math.log2(math.e)
_WIDTH = 128  # channels of one product: those of 256 are refused by the assembler, whose threads
# begin with 128 registers
_FLOOR = -1e30  # start of the running maximum: finite, so that a row without keys stays at zero
_Accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class LatentOp:
    """Everything static beside the shapes."""

    scale: float
    heads: int
    value_dim: int
    num_ctas: int
    stages: int
    interpret: bool = False

    @property
    def columns(self) -> int:
        """Channels of an answer that one warpgroup sums."""
        return self.value_dim // 2


class Gmem(NamedTuple):
    q: Any  # [T * H, D]: a row is one head of one token
    kv: Any  # [P, 1, 1, B, D]
    block_tables: Any
    table: Any  # PrefillTiles, of rows
    count: Any
    out: Any  # [T * H, V]


class Shared(NamedTuple):
    """Shared memory of a thread block, then its barriers."""

    q: Any  # [2, ROWS, V / 2]; in the end the answers, on their way to memory
    k: Any  # [stages, BLOCK, D]
    p: Any  # [ROWS, BLOCK] weights of a block
    decay: Any  # [ROWS] by which sums shrink before it is added; in the end one over the total
    q_full: Any
    q_free: Any
    k_full: Any  # [stages]
    k_free: Any
    k_raw: Any  # a block that still holds what lies past its row's end
    p_full: Any  # weights and decay
    p_free: Any
    q_rest: Any = None  # [ROWS, D - V], unless that is nothing

    def queries(self) -> list[tuple[Any, slice]]:
        """The parts of them, and which channels these are."""
        halves, (_, _, size) = [self.q.at[0], self.q.at[1]], self.q.shape
        parts = [*halves, *([] if self.q_rest is None else [self.q_rest])]
        starts = (0, size, 2 * size)
        return [
            (part, slice(start, start + part.shape[1]))
            for part, start in zip(parts, starts, strict=False)
        ]


class Item(NamedTuple):
    """Scalars of one tile, which every warpgroup reads for itself."""

    slot: Array
    row: Array  # first of the window
    position: Array  # of it among the rows of its sequence: token position * H + head
    low: Array  # window rows of the tile: low <= i < high
    high: Array
    length: Array  # tokens of the sequence
    clear: Array  # blocks that every row sees whole, and all
    end: Array


def my_items(gmem: Gmem, op: LatentOp) -> tuple[Array, Callable[[Array], Item]]:
    """How many items this thread block has, and how to read the i-th. They are sorted by cost:
    dealing them out back and forth evens out the sums."""
    cta, ctas = lax.axis_index("cta"), jnp.int32(op.num_ctas)
    rounds, rest = lax.div(gmem.count[0], ctas), lax.rem(gmem.count[0], ctas)

    def place(turn: Array) -> Array:
        return jnp.where(lax.rem(turn, jnp.int32(2)) == 0, cta, ctas - 1 - cta)

    def read(turn: Array) -> Item:
        tile, heads = turn * ctas + place(turn), jnp.int32(op.heads)
        slot, group, position, low, high, length = (gmem.table[tile, i] for i in range(6))
        length = lax.div(length, heads)
        first = lax.div(lax.max(position + low, jnp.int32(0)), heads)  # token
        end = ceil_div(lax.min(ceil_div(position + high, op.heads), length), BLOCK)
        clear = lax.min(lax.div(first + 1, jnp.int32(BLOCK)), end)
        return Item(slot, group * ALIGN, position, low, high, length, clear, end)

    return rounds + jnp.where(place(rounds) < rest, jnp.int32(1), jnp.int32(0)), read


def produce(gmem: Gmem, smem: Shared, op: LatentOp) -> None:
    """Fetches blocks as far ahead as there are stages, across items; the queries of the next item
    once the answers of this one have left their place."""
    mine, read = my_items(gmem, op)
    stages = jnp.int32(op.stages)

    def fetch_queries(item: Item, turn: Array) -> None:
        @pl.when(turn > 0)
        def _() -> None:
            plgpu.barrier_wait(smem.q_free)

        rows = gmem.q.at[pl.ds(item.row, ROWS)]
        for part, channels in smem.queries():
            plgpu.copy_gmem_to_smem(rows.at[:, channels], part, smem.q_full)

    def one_item(turn: Array, done: Array) -> Array:
        item = read(turn)

        def one_block(block: Array, _: None) -> None:
            step = done + block
            stage = lax.rem(step, stages)

            @pl.when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(smem.k_free.at[stage])

            _fetch(gmem, smem, item, block, stage)
            pl.when(block == lax.min(stages, item.end) - 1)(lambda: fetch_queries(item, turn))

        lax.fori_loop(jnp.int32(0), item.end, one_block, None)
        pl.when(item.end == 0)(lambda: fetch_queries(item, turn))
        return done + item.end

    done = lax.fori_loop(0, mine, one_item, jnp.int32(0))

    # Every arrival must have been waited for before the barriers go away.
    @pl.when(mine > 0)
    def _() -> None:
        plgpu.barrier_wait(smem.q_free)

    @pl.loop(lax.max(done - stages, jnp.int32(0)), done)
    def _(step: Array) -> None:
        plgpu.barrier_wait(smem.k_free.at[lax.rem(step, stages)])


def _fetch(gmem: Gmem, smem: Shared, item: Item, block: Array, stage: Array) -> None:
    page = gmem.kv.shape[3]
    count, parts = max(BLOCK // page, 1), max(page // BLOCK, 1)
    size, target = BLOCK // count, smem.k.at[stage]
    # Past the last page it is fetched again: masked, and no table entry past the end is used.
    last = lax.div(item.length - 1, jnp.int32(page))
    first = lax.div(block, jnp.int32(parts)) * count
    pages = [gmem.block_tables[item.slot, lax.min(first + i, last)] for i in range(count)]

    def copy(barrier: Any) -> None:
        for i in range(count):
            source = gmem.kv.at[pages[i], 0, 0]
            if parts > 1:
                source = source.at[pl.ds(lax.rem(block, jnp.int32(parts)) * BLOCK, BLOCK)]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(i * size, size)], barrier)

    written = item.length - block * BLOCK
    pl.when(written >= BLOCK)(lambda: copy(smem.k_full.at[stage]))

    @pl.when(written < BLOCK)
    def _() -> None:
        copy(smem.k_raw)
        plgpu.barrier_wait(smem.k_raw)
        zero_past(target, written)
        for _ in range(count):
            plgpu.barrier_arrive(smem.k_full.at[stage])


def score(gmem: Gmem, smem: Shared, op: LatentOp) -> None:
    """Weights of each block, and what they do to the sums so far."""
    mine, read = my_items(gmem, op)

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
            stage = lax.rem(done + block, jnp.int32(op.stages))
            plgpu.barrier_wait(smem.k_full.at[stage])

            def multiply(scores: Any) -> Array:
                for part, channels in smem.queries():
                    plgpu.wgmma(scores, part, smem.k.at[stage, :, channels].transpose((1, 0)))
                return scores[...]

            scores = pl.run_scoped(multiply, _Accumulator((ROWS, BLOCK), jnp.float32))
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

    start = (jnp.int32(0), jnp.int32(0))
    _, handed = lax.fori_loop(0, mine, one_item, start)

    @pl.when(handed > 0)
    def _() -> None:
        plgpu.barrier_wait(smem.p_free)


def _rows(value: float) -> Array:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), WGMMA.reduce(1))


def _spread(rows: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(rows, (ROWS, columns), [0])


def _causal(scores: Array, position: Array, key: Array, heads: int) -> Array:
    """Positions of keys in the same units as those of rows: no row is divided by its heads."""

    def index(dimension: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, scores.shape, dimension, layout=WGMMA)

    visible = index(1) * heads - index(0) <= position - key * heads
    return jnp.where(visible, scores, -jnp.inf)


def add(gmem: Gmem, smem: Shared, op: LatentOp, half: Array) -> None:
    """The weighted sum of half the channels, and its way to memory."""
    mine, read = my_items(gmem, op)
    first = half * op.columns
    widths = [min(_WIDTH, op.columns - at) for at in range(0, op.columns, _WIDTH)]
    parts = [(width, i * _WIDTH) for i, width in enumerate(widths)]

    def decayed(sums: tuple[Array, ...]) -> list[Array]:
        decay = plgpu.load(smem.decay, layout=WGMMA.reduce(1))
        return [part * _spread(decay, part.shape[1]) for part in sums]

    def one_item(turn: Array, done: Array) -> Array:
        item = read(turn)

        def one_block(block: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            stage = lax.rem(done + block, jnp.int32(op.stages))
            plgpu.barrier_wait(smem.k_full.at[stage])
            plgpu.barrier_wait(smem.p_full)
            values = [smem.k.at[stage, :, pl.ds(first + at, width)] for width, at in parts]
            sums = _added(smem.p, values, decayed(sums), op.interpret)
            plgpu.barrier_arrive(smem.p_free)
            plgpu.barrier_arrive(smem.k_free.at[stage])
            return sums

        zeros = [jnp.zeros((ROWS, width), jnp.float32) for width in widths]
        zeros = tuple(plgpu.layout_cast(part, WGMMA) for part in zeros)
        sums = lax.fori_loop(0, item.end, one_block, zeros)
        plgpu.barrier_wait(smem.p_full)
        answers = [part.astype(smem.q.dtype) for part in decayed(sums)]
        plgpu.barrier_arrive(smem.p_free)
        plgpu.barrier_wait(smem.q_full)  # an item without blocks: nobody else has waited for it
        staged = smem.q.at[half]
        for part, (width, at) in zip(answers, parts, strict=True):
            staged.at[:, pl.ds(at, width)][...] = part
        plgpu.commit_smem()
        _store(staged, gmem.out.at[:, pl.ds(first, op.columns)], item)
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
                source = pl.multiple_of(start, ALIGN)
                target = pl.multiple_of(item.row + start, ALIGN)
                rows = staged.at[pl.ds(source, size)]
                plgpu.copy_smem_to_gmem(rows, out.at[pl.ds(target, size)])

            start, size = start + digit, size // 2
