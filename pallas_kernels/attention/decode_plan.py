"""The work list of paged decode: which pieces of which rows the persistent kernel walks.

Computed on the device from the lengths, once per step, and shared by all layers of one window.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.attention.decode_config import DecodeConfig


class DecodePlan(NamedTuple):
    """N and S are static bounds that follow from the width of the block tables."""

    items: Int[Array, "N 4"]  # row, split of the row, partial slot (-1: the row's only split), len
    num_items: Int[Array, "1"]  # items in use
    row_slots: Int[Array, " R"]  # first partial slot of a row with several splits
    row_splits: Int[Array, " R"]  # splits of the row; 1 for an empty row, whose output is zero


def max_splits(max_pages: int, page_size: int, window: int | None, config: DecodeConfig) -> int:
    """The most splits one row can have."""
    splits = -(-max_pages * page_size // config.split_tokens)
    if window is not None:
        splits = min(splits, -(-window // config.split_tokens) + 1)
    return max(splits, 1)


def plan_decode(
    seq_lens: Int[Array, " R"],
    *,
    max_pages: int,
    page_size: int,
    window: int | None = None,
    config: DecodeConfig,
) -> DecodePlan:
    """Cuts every row at multiples of ``split_tokens`` and orders the pieces longest first.

    Items are dealt to the CTAs in turn, so whole splits come first and the last piece of each row
    after them in falling length.
    """
    rows, size = seq_lens.shape[0], config.split_tokens
    seen = jnp.zeros_like(seq_lens) if window is None else jnp.maximum(seq_lens - window, 0)
    first = seen // size
    last = jnp.maximum(seq_lens - 1, 0) // size
    splits = last - first + 1
    whole_ends = jnp.cumsum(splits - 1)
    slots = jnp.where(splits > 1, splits, 0)
    row_slots = jnp.cumsum(slots) - slots

    # Last pieces by falling length, ties by row: a rank is a count, no sort needed.
    tail = seq_lens - jnp.maximum(last * size, seen)
    index = jnp.arange(rows, dtype=jnp.int32)
    longer, equal = tail[None] > tail[:, None], tail[None] == tail[:, None]
    ahead = longer | (equal & (index[None] < index[:, None]))
    tail_row = jnp.zeros(rows, jnp.int32).at[ahead.sum(axis=1)].set(index)

    item = jnp.arange(rows * max_splits(max_pages, page_size, window, config), dtype=jnp.int32)
    is_whole = item < whole_ends[-1]
    whole_row = (whole_ends[None] <= item[:, None]).sum(axis=1)
    row = jnp.where(
        is_whole,
        jnp.minimum(whole_row, rows - 1),
        tail_row[jnp.clip(item - whole_ends[-1], 0, rows - 1)],
    )
    local = jnp.where(is_whole, item - (whole_ends - splits + 1)[row], splits[row] - 1)
    slot = jnp.where(splits[row] > 1, row_slots[row] + local, -1)
    items = jnp.stack([row, first[row] + local, slot, seq_lens[row]], axis=1).astype(jnp.int32)
    num_items = (whole_ends[-1:] + rows).astype(jnp.int32)
    return DecodePlan(items, num_items, row_slots.astype(jnp.int32), splits.astype(jnp.int32))
