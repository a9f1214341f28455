"""Which blocks of keys a kernel walks where a mask alone says what is hidden: for every decoding
row and every tile of prefill the blocks of which anything is seen, those seen whole apart.

The mask is asked for every pair of a query and a key, once per step for all layers that see alike:
elementwise work without channels, and without heads where it does not tell them apart. The map is
an operand, so no request compiles anything.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.prefill_tiles import PrefillConfig, PrefillTiles
from pallas_kernels.attention.variant_params import param_arrays
from pallas_kernels.attention.xla_queries import (
    Mods,
    Pairs,
    Queries,
    decode_queries,
    param_values,
    visible_pairs,
)
from pallas_kernels.attention.xla_spans import Sight


class PageMap(NamedTuple):
    """Of N groups of queries, over C blocks of keys."""

    # The blocks that are seen in part, from the first key on, then those seen whole.
    order: Int[Array, "N C"]
    counts: Int[Array, "N 2"]  # blocks seen in part; all that are seen


def decode_map(seq_lens: Int[Array, " R"], num_heads: int, sight: Sight, block: int) -> PageMap:
    """Of one query per row, at position ``seq_lens - 1``. All its blocks count as seen in part, so
    that they are walked in order of position."""
    seen, _ = _ask(decode_queries(seq_lens), num_heads, sight, block)
    return _listed(seen, jnp.zeros_like(seen))


def prefill_map(
    tiles: PrefillTiles, num_heads: int, sight: Sight, config: PrefillConfig
) -> PageMap:
    """Of the tiles' own queries."""
    slot, _, position, low, high, written, *_ = tiles.table.T
    index = jnp.arange(config.tokens, dtype=jnp.int32)[None]
    own = (index >= low[:, None]) & (index < high[:, None]) & (written > 0)[:, None]
    positions = jnp.where(own, position[:, None] + index, -1)
    return _listed(*_ask(Queries(positions, slot, written), num_heads, sight, config.block_kv))


def _ask(
    queries: Queries, num_heads: int, sight: Sight, block: int
) -> tuple[Bool[Array, "N C"], Bool[Array, "N C"]]:
    """Which blocks are seen, and which of them whole: by all heads and all queries."""
    num_rows, max_pages = sight.tables
    params = param_arrays(sight.variant, num_heads, num_rows, sight.row_params)
    mods = Mods(1.0, sight.window, sight.variant, params, None)
    count = -(-max_pages * sight.page_size // block)
    pairs = Pairs.of(queries, jnp.arange(count * block, dtype=jnp.int32)[None], num_heads, 1)
    visible = visible_pairs(pairs, queries, mods, param_values(pairs, queries.rows, mods))
    groups, heads, asking, _ = visible.shape
    found = visible.reshape(groups, heads, asking, count, block)
    found = jnp.sum(found, axis=(1, 2, 4), dtype=jnp.int32)  # one reduction answers both
    most = jnp.sum(queries.positions >= 0, axis=1, dtype=jnp.int32) * (heads * block)
    return found > 0, (found > 0) & (found == most[:, None])


def _listed(seen: Bool[Array, "N C"], whole: Bool[Array, "N C"]) -> PageMap:
    """By counting, which is cheaper on a GPU than sorting."""
    count = seen.shape[1]
    partial = seen & ~whole
    partials = jnp.sum(partial, axis=1, dtype=jnp.int32)
    after = partials[:, None] + jnp.cumsum(whole, axis=1, dtype=jnp.int32)
    place = jnp.where(whole, after, jnp.cumsum(partial, axis=1, dtype=jnp.int32)) - 1
    place = jnp.where(seen, place, count)
    group = jnp.arange(seen.shape[0], dtype=jnp.int32)[:, None]
    blocks = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], seen.shape)
    order = jnp.zeros(seen.shape, jnp.int32).at[group, place].set(blocks, mode="drop")
    total = jnp.sum(seen, axis=1, dtype=jnp.int32)
    return PageMap(order, jnp.stack([partials, total], axis=1))
