"""What producer and consumers of the prefill kernel share: names of their memory, and their work.

Items, a tile and a head (or pair of heads) each, are dealt to a persistent grid of thread blocks.
"""

from collections.abc import Callable
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
    turn: Any  # the consumers meet here
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


def my_items(gmem: Gmem, op: PrefillOp) -> tuple[Array, Callable[[Array], Item]]:
    """How many items this thread block has, and how to read the i-th."""
    units = gmem.q.shape[1] // op.config.heads_per_tile
    dealt = Dealt(gmem.count[0] * units, op.config.num_ctas)
    return dealt.count, lambda turn: _read_item(gmem, op, dealt(turn), units)


def _read_item(gmem: Gmem, op: PrefillOp, index: Array, units: int) -> Item:
    tile, unit = lax.div(index, jnp.int32(units)), lax.rem(index, jnp.int32(units))
    slot, group, position, low, high, seq_len = (gmem.table[tile, i] for i in range(6))
    begin = jnp.int32(0)
    if op.variant.is_mapped:
        end = gmem.counts[tile, 1]
        facts = (slot, group * ALIGN, position, low, high, seq_len, unit, begin, end)
        return Item(*facts, tile, gmem.counts[tile, 0])
    if op.ranged:
        first, stop = gmem.spans[tile, 0], gmem.spans[tile, 1]
        begin = lax.div(first, jnp.int32(op.config.block_kv))
        end = lax.max(ceil_div(stop, op.config.block_kv), begin)
        return Item(slot, group * ALIGN, position, low, high, seq_len, unit, begin, end)
    if op.window is not None:
        oldest = position + low - (op.window - 1)
        begin = lax.div(lax.max(oldest, jnp.int32(0)), jnp.int32(op.config.block_kv))
    end = ceil_div(lax.min(position + high, seq_len), op.config.block_kv)
    end = lax.max(end, begin)
    return Item(slot, group * ALIGN, position, low, high, seq_len, unit, begin, end)


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
