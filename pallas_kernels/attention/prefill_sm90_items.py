"""What producer and consumers of the prefill kernel share: names of their memory, and their work.

Items, a tile and a head (or pair of heads) each, are dealt to a persistent grid of thread blocks.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.dealt import Dealt
from pallas_kernels.attention.prefill_tiles import ALIGN, ROWS, PrefillConfig
from pallas_kernels.attention.variant import AttentionVariant

WGMMA = plgpu.Layout.WGMMA


@dataclass(frozen=True)
class PrefillOp:
    """Everything static beside the shapes."""

    scale: float
    window: int | None
    variant: AttentionVariant
    config: PrefillConfig

    def __post_init__(self) -> None:
        """Values are operands: layers that differ by them share one kernel."""
        object.__setattr__(self, "variant", self.variant.without_values())

    @property
    def ranged(self) -> bool:
        """Whether tiles come with the positions that they may see."""
        ahead = self.variant.lookahead is not None and not self.variant.is_mapped
        return self.variant.kv_range is not None or ahead


class Shared(NamedTuple):
    """Shared memory of a thread block, then its barriers. C, ``columns_at_once``, is D or less."""

    q: Any  # [2, ROWS, D]
    k: Any  # [stages, block_kv, D]
    v: Any
    o_rows: Any  # [2, ROWS, C], row after row, for tiles whose rows are not all their own
    q_full: Any
    q_free: Any
    k_full: Any  # [stages]
    k_free: Any
    v_full: Any
    v_free: Any
    turn: Any  # [2], one for each consumer
    o: Any = None  # [2, ROWS, C], laid out for whole tiles
    v_raw: Any = None  # a V block that still holds what lies past its row's end
    narrow: Any = None  # [2, block_kv, D] keys, values of eight bits; then neither of the two above
    narrow_full: Any = None  # [2]
    p: Any = None  # [2, ROWS, block_kv], interpreter only
    numbers: Any = None  # [stages, per_token params, block_kv] of keys


class Gmem(NamedTuple):
    q: Any
    kv: Any
    block_tables: Any
    table: Any
    count: Any
    out: Any
    params: tuple[Any, ...] = ()  # of the variant, in order
    spans: Any = None  # [N, 2] first and last + 1 visible position, if op.ranged
    order: Any = None  # [N, C] the tiles' PageMap, if the variant is mapped
    counts: Any = None
    token_pages: Any = None  # [P, N, K, B], if the variant has per_token params
    token_queries: Any = None  # [N, K, T]


class Item(NamedTuple):
    """Scalars of one tile and head, which every warpgroup reads for itself."""

    slot: Array
    token: Array  # first token of the window
    position: Array  # of that token in its row; may be negative
    low: Array  # window rows of the tile: low <= i < high
    high: Array
    seq_len: Array
    unit: Array  # head, or pair of heads
    begin: Array  # first and last + 1 block of keys, or of the tile's list of them
    end: Array
    tile: Any = None  # of a mapped variant only, as is the first place with a block seen whole
    whole: Any = None


def ceil_div(x: Array, y: int) -> Array:
    return lax.div(x + jnp.int32(y - 1), jnp.int32(y))


class Items:
    """This thread block's items."""

    def __init__(self, gmem: Gmem, op: PrefillOp):
        self._gmem, self._op = gmem, op
        self._units = gmem.q.shape[1] // op.config.heads_per_tile
        self._dealt = Dealt(gmem.count[0] * self._units, op.config.num_ctas)
        self.count = self._dealt.count

    def describe(self, turn: Array) -> tuple[Array, ...]:
        """Reads the item of a turn, or one that is in the table but not in use: ahead of time."""
        gmem, op = self._gmem, self._op
        unit = lax.min(self._dealt(turn), jnp.int32(gmem.table.shape[0] * self._units - 1))
        tile, unit = (f(unit, jnp.int32(self._units)) for f in (lax.div, lax.rem))
        fields = (*(gmem.table[tile, i] for i in range(6)), unit)
        if op.variant.is_mapped:
            return (*fields, gmem.counts[tile, 0], gmem.counts[tile, 1], tile)
        return (*fields, gmem.spans[tile, 0], gmem.spans[tile, 1]) if op.ranged else fields

    def item(self, description: tuple[Array, ...]) -> Item:
        slot, group, position, low, high, seq_len, unit, *rest = description
        block_kv, begin = self._op.config.block_kv, jnp.int32(0)
        facts = (slot, group * ALIGN, position, low, high, seq_len, unit)
        if self._op.variant.is_mapped:
            whole, end, tile = rest
            return Item(*facts, begin, end, tile, whole)
        if self._op.ranged:
            first, stop = rest
            begin = lax.div(first, jnp.int32(block_kv))
            return Item(*facts, begin, lax.max(ceil_div(stop, block_kv), begin))
        if self._op.window is not None:
            oldest = position + low - (self._op.window - 1)
            begin = lax.div(lax.max(oldest, jnp.int32(0)), jnp.int32(block_kv))
        end = ceil_div(lax.min(position + high, seq_len), block_kv)
        return Item(*facts, begin, lax.max(end, begin))


def block_at(gmem: Gmem, item: Item, place: Array) -> Array:
    """The block of keys in that place of the item's list, or any where there is none."""
    if item.tile is None:
        return place
    return gmem.order[item.tile, lax.min(place, jnp.int32(gmem.order.shape[1] - 1))]


def kv_head_of(gmem: Gmem, head: Array) -> Array:
    return lax.div(head, jnp.int32(gmem.q.shape[1] // gmem.kv.shape[2]))


def rows_and_head(item: Item, consumer: Array | int, config: PrefillConfig) -> tuple[Any, Any]:
    """First window row and query head of a consumer."""
    if config.heads_per_tile == 2:
        return jnp.int32(0), item.unit * 2 + consumer
    return jnp.int32(consumer * ROWS), item.unit
