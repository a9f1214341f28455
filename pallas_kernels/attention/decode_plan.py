"""The work list of paged decode: which stretches of which rows the persistent kernel walks.

Computed on the device from the lengths, once per step, and shared by all layers of one window.
It decides who computes what and never the order of summation, so it is free to follow the batch:
with little work a row goes to many CTAs, with much a row is one item and leaves no partial sums.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.attention.decode_config import DecodeConfig
from pallas_kernels.attention.page_map import decode_map
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_params import Params, kv_spans, param_arrays
from pallas_kernels.attention.xla_spans import Sight

# Room for partial sums, per CTA. Items so short that they leave more are not worth it, and so the
# room grows neither with the batch nor with the length of a row.
_SLOTS_PER_CTA = 8
_ITEM_COST = 0.5  # of one item beside its splits, in splits


class DecodePlan(NamedTuple):
    """With room for S partial sums there are up to N = R + S items and X = S / 2 split rows."""

    # row, first split, end split, first slot (-1: the whole row), length; for a variant with a
    # kv_range the length is the end of what is visible, and two more: its begin, and the query;
    # for a mapped variant one more: the length of what is walked, of which splits are counted
    items: Int[Array, "N 5"] | Int[Array, "N 6"] | Int[Array, "N 7"]
    counts: Int[Array, "3"]  # items; splits in a partial sum, 1 or those of a chunk; split rows
    split_rows: Int[Array, "X 4"]  # row, first slot, first and end partial sum from position 0 on
    visits: Int[Array, "R C"] | None = None  # blocks of keys that a mapped variant's row walks

    @property
    def num_slots(self) -> int:
        return 2 * self.split_rows.shape[0]


class _Spans(NamedTuple):
    """The splits that each row's query sees."""

    first: Int[Array, " R"]
    last: Int[Array, " R"]

    def pieces(self, shift: Int[Array, ""]) -> Int[Array, " R"]:
        """Into how many pieces of ``2 ** shift`` splits each row is cut."""
        return (self.last >> shift) - (self.first >> shift) + 1


def max_slots(
    rows: int,
    *,
    max_pages: int,
    page_size: int,
    num_kv_heads: int,
    window: int | None = None,
    config: DecodeConfig,
) -> int:
    """The most partial sums of a plan: even, and zero where no row can have two splits."""
    splits = -(-max_pages * page_size // config.split_tokens)
    if window is not None:
        splits = min(splits, -(-window // config.split_tokens) + 1)
    if splits < 2:
        return 0
    return min(rows * splits, _SLOTS_PER_CTA * config.num_ctas // num_kv_heads) // 2 * 2


def plan_decode(
    seq_lens: Int[Array, " R"],
    *,
    max_pages: int,
    page_size: int,
    num_kv_heads: int,
    window: int | None = None,
    config: DecodeConfig,
    variant: AttentionVariant = CAUSAL,
    num_heads: int = 0,
    head_dim: int = 128,
    row_params: Params | None = None,
) -> DecodePlan:
    """Cuts rows at multiples of an item's size, counted from position 0, and orders the items
    longest first. An empty row is an item too: its output is zero.
    ``num_heads`` and ``row_params`` matter to a variant that hides something, ``head_dim`` (of
    pages) to a mapped one."""
    query, begin, visits, length = seq_lens - 1, None, None, seq_lens
    if variant.is_mapped:
        block = config.block_tokens(page_size, head_dim)
        sight = Sight(window, variant, row_params, page_size, (seq_lens.shape[0], max_pages))
        visits, counts = decode_map(seq_lens, num_heads, sight, block)
        seq_lens, window = counts[:, 1] * block, None
    elif variant.kv_range is not None:
        slots = jnp.arange(seq_lens.shape[0], dtype=jnp.int32)
        params = param_arrays(variant, num_heads, seq_lens.shape[0], row_params)
        begin, seq_lens = kv_spans(variant, params, slots, query, query, seq_lens, window)
        length = seq_lens
    rows, size = seq_lens.shape[0], config.split_tokens
    num_slots = max_slots(
        rows,
        max_pages=max_pages,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        window=window,
        config=config,
    )
    if begin is not None:
        seen = begin
    else:
        seen = jnp.zeros_like(seq_lens) if window is None else jnp.maximum(seq_lens - window, 0)
    spans = _Spans(seen // size, jnp.maximum(seq_lens - 1, 0) // size)
    longest = -(-max_pages * page_size // size)
    shift = _item_shift(spans, longest, num_slots, num_kv_heads, config)
    unit = _partial_shift(shift, config)
    pieces = spans.pieces(shift)
    slots = _partials(spans, shift, config)
    row_slots = jnp.cumsum(slots) - slots
    full_ends = jnp.cumsum(pieces - 1)

    item = jnp.arange(rows + num_slots, dtype=jnp.int32)
    is_full = item < full_ends[-1]
    tail = seq_lens - jnp.maximum((spans.last >> shift << shift) * size, seen)
    tail_row = _falling(tail)[jnp.clip(item - full_ends[-1], 0, rows - 1)]
    row = jnp.where(is_full, _owner(full_ends, item), tail_row)
    place = jnp.where(is_full, item - (full_ends - pieces + 1)[row], pieces[row] - 1)
    place = place + (spans.first[row] >> shift)
    first = jnp.maximum(place << shift, spans.first[row])
    end = jnp.minimum((place + 1) << shift, spans.last[row] + 1)
    slot = row_slots[row] + (first >> unit) - (spans.first[row] >> unit)
    slot = jnp.where(pieces[row] > 1, slot, -1)

    split_ends = jnp.cumsum(pieces > 1)
    split = _owner(split_ends, jnp.arange(num_slots // 2, dtype=jnp.int32))
    partials = (spans.first[split] >> unit, (spans.last[split] >> unit) + 1)
    more = () if begin is None else (begin[row], query[row])
    more = more if visits is None else (seq_lens[row],)
    return DecodePlan(
        _table(row, first, end, slot, length[row], *more),
        _table(full_ends[-1] + rows, 1 << unit, split_ends[-1]),
        _table(split, row_slots[split], *partials),
        visits,
    )


def _item_shift(
    spans: _Spans, longest: int, num_slots: int, kv_heads: int, config: DecodeConfig
) -> Int[Array, ""]:
    """Items of up to ``2 ** shift`` splits: the size with which the last CTA ends first, by the
    lower of two upper bounds. Either all work in rounds, or none waits for longer than one item
    takes (Graham 1969). The largest size leaves every row whole, so there is always one whose
    partial sums have room.
    """
    shifts = jnp.arange((longest - 1).bit_length(), -1, -1, dtype=jnp.int32)
    items = jax.vmap(spans.pieces)(shifts).sum(axis=1)
    partials = jax.vmap(lambda shift: _partials(spans, shift, config).sum())(shifts)
    splits, ctas = spans.last - spans.first + 1, config.num_ctas
    cost = jnp.minimum(1 << shifts, splits.max()).astype(jnp.float32) + _ITEM_COST
    rounds = -(-items * kv_heads // ctas)
    work = splits.sum().astype(jnp.float32) + _ITEM_COST * items.astype(jnp.float32)
    mean = work * (kv_heads / ctas)
    end = jnp.minimum(rounds.astype(jnp.float32) * cost, mean + cost * (1 - 1 / ctas))
    return shifts[jnp.argmin(jnp.where(partials <= num_slots, end, jnp.inf))]


def _partials(spans: _Spans, shift: Int[Array, ""], config: DecodeConfig) -> Int[Array, " R"]:
    """How many partial sums each row has; none if it is a single item."""
    return jnp.where(spans.pieces(shift) > 1, spans.pieces(_partial_shift(shift, config)), 0)


def _partial_shift(shift: Int[Array, ""], config: DecodeConfig) -> Int[Array, ""]:
    """Items shorter than a chunk leave a partial sum per split, the others one per chunk."""
    chunk = config.splits_per_chunk.bit_length() - 1
    return jnp.where(shift < chunk, 0, chunk)


def _falling(lengths: Int[Array, " R"]) -> Int[Array, " R"]:
    """The rows by falling length, ties by row. A rank is a count: no sort needed."""
    index = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    longer, equal = lengths[None] > lengths[:, None], lengths[None] == lengths[:, None]
    ahead = longer | (equal & (index[None] < index[:, None]))
    return jnp.zeros_like(index).at[ahead.sum(axis=1)].set(index)


def _owner(ends: Int[Array, " R"], places: Int[Array, " N"]) -> Int[Array, " N"]:
    """Which of R stretches, given by their ends, each place lies in."""
    return jnp.minimum((ends[None] <= places[:, None]).sum(axis=1), ends.shape[0] - 1)


def _table(*columns: Array) -> Array:
    return jnp.stack(columns, axis=-1).astype(jnp.int32)
