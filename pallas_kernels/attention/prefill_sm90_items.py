"""What producer and consumers of the prefill kernel share: names of their memory, and their work.

Items, a tile and a head (or pair of heads) each, are dealt to a persistent grid of thread blocks.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.prefill_tiles import ALIGN, ROWS, PrefillConfig

WGMMA = plgpu.Layout.WGMMA


@dataclass(frozen=True)
class PrefillOp:
    """Everything static beside the shapes."""

    scale: float
    window: int | None
    softcap: float | None
    config: PrefillConfig


class Shared(NamedTuple):
    """Shared memory of a thread block, then its barriers."""

    q: Any  # [2, ROWS, D]
    k: Any  # [stages, block_kv, D]
    v: Any
    o: Any  # [2, ROWS, D], laid out for whole tiles
    o_rows: Any  # [2, ROWS, D], row after row, for tiles whose rows are not all their own
    q_full: Any  # [2], one per consumer
    q_free: Any
    k_full: Any  # [stages]
    k_free: Any
    v_full: Any
    v_free: Any
    v_raw: Any  # a V block that still holds what lies past its row's end
    turn: Any  # the consumers meet here
    p: Any = None  # [2, ROWS, block_kv], interpreter only


class Gmem(NamedTuple):
    q: Any
    kv: Any
    block_tables: Any
    table: Any
    counts: Any
    out: Any


class Item(NamedTuple):
    """Scalars of one tile and head, or pair of heads, which every warpgroup reads for itself."""

    slot: Array
    token: Array  # first token of the window
    position: Array  # of that token in its row; may be negative
    low: Array  # window rows of the tile: low <= i < high
    high: Array
    seq_len: Array
    unit: Array  # head, or pair of heads
    reach: Array  # keys that its last row may see
    begin: Array  # first and last + 1 block of keys; there is at least one
    end: Array

    @classmethod
    def of(cls, words: tuple[Array, ...], op: PrefillOp) -> "Item":
        """From what ``Walk.describe`` read."""
        slot, group, position, low, high, seq_len, unit = words
        begin = jnp.int32(0)
        if op.window is not None:
            oldest = position + low - (op.window - 1)
            begin = lax.div(lax.max(oldest, jnp.int32(0)), jnp.int32(op.config.block_kv))
        reach = lax.min(position + high, seq_len)
        end = ceil_div(reach, op.config.block_kv)
        return cls(slot, group * ALIGN, position, low, high, seq_len, unit, reach, begin, end)


def ceil_div(x: Array, y: int) -> Array:
    return lax.div(x + jnp.int32(y - 1), jnp.int32(y))


class Walk:
    """The items of this thread block: first ``count`` with keys, then ``blanks`` without.

    Items are sorted by cost; dealing them out back and forth evens out the sums.
    """

    def __init__(self, gmem: Gmem, op: PrefillOp):
        self._table, self._units = gmem.table, gmem.q.shape[1] // op.config.heads_per_tile
        self._cta, self._ctas = lax.axis_index("cta"), jnp.int32(op.config.num_ctas)
        self._attended, used = (gmem.counts[i] * self._units for i in range(2))
        rounds, rest = (f(self._attended, self._ctas) for f in (lax.div, lax.rem))
        one_more = self._place(rounds) < rest
        self.count = rounds + jnp.where(one_more, jnp.int32(1), jnp.int32(0))
        self.blanks = ceil_div(
            lax.max(used - self._attended - self._cta, jnp.int32(0)), op.config.num_ctas
        )

    def _place(self, turn: Array) -> Array:
        return jnp.where(lax.rem(turn, jnp.int32(2)) == 0, self._cta, self._ctas - 1 - self._cta)

    def describe(self, turn: Array) -> tuple[Array, ...]:
        """Reads an item with keys. Nothing is computed from what was read, so that a caller can
        work until it arrives."""
        return self._read(turn * self._ctas + self._place(turn))

    def describe_blank(self, turn: Array) -> tuple[Array, ...]:
        """Reads an item without keys, or, past the last, any."""
        return self._read(self._attended + turn * self._ctas + self._cta)

    def _read(self, index: Array) -> tuple[Array, ...]:
        index = lax.min(index, jnp.int32(self._table.shape[0] * self._units - 1))
        tile, unit = (f(index, jnp.int32(self._units)) for f in (lax.div, lax.rem))
        return (*(self._table[tile, field] for field in range(6)), unit)


def rows_and_head(unit: Array, consumer: Array | int, config: PrefillConfig) -> tuple[Any, Any]:
    """First window row and query head of a consumer."""
    if config.heads_per_tile == 2:
        return jnp.int32(0), unit * 2 + consumer
    return jnp.int32(consumer * ROWS), unit
