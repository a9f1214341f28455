"""Which stretches of keys a mask shows anything of, where there is no ``kv_range`` to say so."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_params import Params, param_arrays
from pallas_kernels.attention.xla_queries import (
    Mods,
    Pairs,
    Queries,
    TileMap,
    decode_queries,
    pages_per_span,
    param_values,
    tile_queries,
    visible_pairs,
)


class SpanMap(NamedTuple):
    """Which stretches of SPAN keys queries see anything of, for each of N groups of them: the
    first ``count`` of ``order``, from the first key on. What follows in it is hidden whole."""

    order: Int[Array, "N C"]
    count: Int[Array, " N"]


class Sight(NamedTuple):
    """What decides which keys queries see, and how the row's keys are cut."""

    window: int | None
    variant: AttentionVariant
    row_params: Params | None
    page_size: int
    tables: tuple[int, ...]  # shape of the block tables, [R, M]


def decode_spans(seq_lens: Int[Array, " R"], num_heads: int, sight: Sight) -> SpanMap:
    """For ``paged_decode``."""
    return _find_spans(decode_queries(seq_lens), num_heads, sight)


def prefill_spans(
    positions: Int[Array, " T"],
    tiles: TileMap,
    seq_lens: Int[Array, " R"] | None,
    num_heads: int,
    sight: Sight,
) -> SpanMap:
    """For ``paged_prefill``."""
    every = jnp.arange(tiles.slot.shape[0])
    _, queries = tile_queries(positions, tiles, every, sight.variant, seq_lens)
    return _find_spans(queries, num_heads, sight)


def _find_spans(queries: Queries, num_heads: int, sight: Sight) -> SpanMap:
    """Asks the mask for every pair of a query and a key, which costs little beside attending: no
    channels, no heads where it does not tell them apart, and once for all layers that see alike.
    """
    num_rows, max_pages = sight.tables
    params = param_arrays(sight.variant, num_heads, num_rows, sight.row_params)
    mods = Mods(1.0, sight.window, sight.variant, params, None)
    span = pages_per_span(sight.page_size, max_pages) * sight.page_size
    count = -(-max_pages * sight.page_size // span)

    def body(index: Int[Array, ""], seen: Bool[Array, "N C"]) -> Bool[Array, "N C"]:
        kv_pos = (index * span + jnp.arange(span))[None]
        pairs = Pairs.of(queries, kv_pos, num_heads, 1)
        visible = visible_pairs(pairs, queries, mods, param_values(pairs, queries.rows, mods))
        return seen.at[:, index].set(visible.any(axis=(1, 2, 3)))

    seen = jnp.zeros((queries.rows.shape[0], count), jnp.bool_)
    seen = lax.fori_loop(0, (jnp.max(queries.written) + span - 1) // span, body, seen)
    order = jnp.argsort(~seen, axis=1, stable=True).astype(jnp.int32)
    return SpanMap(order, jnp.sum(seen, axis=1, dtype=jnp.int32))
