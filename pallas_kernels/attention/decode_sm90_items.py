"""What producer and consumer of the decode kernel share: static sizes, and their work."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.dealt import Dealt
from pallas_kernels.attention.decode_config import (
    DecodeConfig,
    padded_group,
    query_slots,
    shares_scores,
)
from pallas_kernels.attention.decode_sm90_sums import Ref
from pallas_kernels.attention.variant import AttentionVariant


@dataclass(frozen=True)
class DecodeOp:
    """Everything static that is not a shape."""

    scale: float
    window: int | None
    variant: AttentionVariant
    config: DecodeConfig
    interpret: bool = False
    detect_races: bool = False
    value_dim: int | None = None  # of latents: pages hold keys, whose first channels are the values

    def __post_init__(self) -> None:
        """Values are operands: layers that differ by them share one kernel."""
        object.__setattr__(self, "variant", self.variant.without_values())

    def interpret_params(self) -> Any:
        if not self.interpret:
            return False
        return plgpu.InterpretGPUParams(detect_races=self.detect_races)


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of one call; ``group`` query heads share a KV head. Of latents ``kv_heads`` counts the
    groups: they all read the same pages."""

    rows: int
    kv_heads: int
    group: int
    dim: int
    dtype: Any  # what is multiplied: 16 bits
    page: int
    block: int  # tokens per stage
    pages: Any  # dtype of pages; if not ``dtype``, they are widened in shared memory
    answers: Any  # dtype of the output
    numbers: int = 0  # per_token params of the variant
    value_dim: int | None = None  # of latents

    @property
    def is_latent(self) -> bool:
        return self.value_dim is not None

    @property
    def consumers(self) -> int:
        """Warpgroups that compute: the sums of 512 channels are too many for the registers of
        one."""
        return 2 if self.is_latent else 1

    @property
    def answer_dim(self) -> int:
        return self.value_dim or self.dim

    @property
    def columns(self) -> int:
        """Channels of an answer that one consumer sums."""
        return self.answer_dim // self.consumers

    def columns_of(self, consumer: Array) -> tuple[Any, ...]:
        """Where they lie; nothing if they are all."""
        return (pl.ds(consumer * self.columns, self.columns),) if self.is_latent else ()

    @property
    def query_slots(self) -> int:
        """The next item's queries are fetched ahead where there is room for them."""
        return query_slots(self.padded, self.value_dim)

    @property
    def shares_scores(self) -> bool:
        return self.is_latent and shares_scores(self.padded)

    @property
    def pages_per_block(self) -> int:
        """Copies that fill a stage: of whole pages, or one of a part of a page."""
        return max(self.block // self.page, 1)

    @property
    def blocks_per_page(self) -> int:
        return max(self.page // self.block, 1)

    @property
    def widens(self) -> bool:
        return self.pages != self.dtype

    @property
    def padded(self) -> int:
        return padded_group(self.group)


def whole_tile(heads: int) -> Any:
    """All heads of a tile, though the array may end before: copies between GMEM and SMEM fill
    with zeros or drop what lies past the end. A start that is not a constant escapes JAX's check.
    """
    return pl.ds(lax.axis_index("cta") * 0, heads)


class Item(NamedTuple):
    """Consecutive splits of one row, for one KV head."""

    row: Array
    first_split: Array
    end_split: Array
    slot: Array  # of the first partial sum; -1: this is the whole row
    length: Array  # of the row; with a variant's kv_range: the end of what is visible
    head: Array
    first: Any = None  # visible position, and the query's: only with a variant's kv_range
    position: Any = None
    walked: Any = None  # tokens of the blocks that a mapped variant's query sees

    @property
    def query(self) -> Array:
        """Its position."""
        return self.length - 1 if self.position is None else self.position

    def begin(self, op: DecodeOp) -> Array:
        """The first position the query sees."""
        if self.first is not None:
            return self.first
        if op.window is None:
            return jnp.int32(0)
        return lax.max(self.length - op.window, jnp.int32(0))

    def blocks(self, op: DecodeOp, block: int, first: Array, end: Array) -> tuple[Array, Array]:
        """First and last + 1 block of some of the splits, counted from position 0."""
        size = op.config.split_tokens
        if self.walked is not None:
            last = lax.min(end * size, self.walked)
            return first * (size // block), lax.div(last, jnp.int32(block))
        last_token = lax.min(end * size, self.length)
        first_block = lax.max(first * (size // block), lax.div(self.begin(op), jnp.int32(block)))
        return first_block, lax.div(last_token + (block - 1), jnp.int32(block))


class Walk:
    """This CTA's items."""

    def __init__(
        self, shape: DecodeShape, op: DecodeOp, items: Ref, counts: Ref, visits: Ref = None
    ):
        self.shape, self.op, self._items, self._visits = shape, op, items, visits
        self._dealt = Dealt(counts[0] * shape.kv_heads, op.config.num_ctas)
        self.count = self._dealt.count

    def describe(self, turn: Array) -> tuple[Array, ...]:
        """Reads this CTA's item of a turn, or one that is in the table but not in use: ahead of
        time, and without waiting for how many there are."""
        unit = lax.min(self._dealt(turn), jnp.int32(self._items.shape[0] * self.shape.kv_heads - 1))
        item, head = (f(unit, jnp.int32(self.shape.kv_heads)) for f in (lax.div, lax.rem))
        fields = [self._items[item, field] for field in range(self._items.shape[1])]
        return (*fields[:5], head, *fields[5:])

    def item(self, description: tuple[Array, ...]) -> Item:
        if self._visits is None:
            return Item(*description)
        *fields, walked = description
        return Item(*fields, walked=walked)

    def block_at(self, item: Item, place: Array) -> Array:
        """The block of keys that is walked in that place, or any where there is none. Read ahead of
        time, too."""
        if self._visits is None:
            return place
        return self._visits[item.row, lax.min(place, jnp.int32(self._visits.shape[1] - 1))]
