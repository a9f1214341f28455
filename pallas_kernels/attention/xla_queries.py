"""Queries of plain XLA attention, and what of the keys they see."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_params import OfPair, Params

TILE = 32  # queries of one row that are attended together in prefill
SPAN = 128  # key positions per loop iteration


class TileMap(NamedTuple):
    """Prefill tokens cut into tiles of at most TILE queries, each of one row. N is a static
    bound.
    """

    slot: Int[Array, " N"]  # batch slot of the tile
    start: Int[Array, " N"]  # first token of the tile
    stop: Int[Array, " N"]  # one past its last token
    count: Int[Array, ""]  # tiles in use; the rest is padding


def make_tile_map(
    query_start_loc: Int[Array, " R1"], num_decode_rows: Int[Array, ""], num_tokens: int
) -> TileMap:
    """Tiles of all slots from ``num_decode_rows`` on."""
    rows = query_start_loc.shape[0] - 1
    lengths = query_start_loc[1:] - query_start_loc[:-1]
    lengths = jnp.where(jnp.arange(rows) >= num_decode_rows, lengths, 0)
    ends = jnp.cumsum((lengths + TILE - 1) // TILE)  # exclusive end of each slot's tiles
    tile = jnp.arange(num_tokens // TILE + rows, dtype=jnp.int32)
    slot = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), rows - 1).astype(jnp.int32)
    first = ends[slot] - (lengths[slot] + TILE - 1) // TILE
    start = query_start_loc[slot] + (tile - first) * TILE
    stop = jnp.minimum(start + TILE, query_start_loc[slot + 1])
    return TileMap(slot, start, jnp.where(tile < ends[-1], stop, start), ends[-1])


class Queries(NamedTuple):
    """S queries of each of N rows; position -1 marks padding."""

    positions: Int[Array, "N S"]
    rows: Int[Array, " N"]
    written: Int[Array, " N"]  # keys at or past it are not this row's


def decode_queries(seq_lens: Int[Array, " R"]) -> Queries:
    rows = jnp.arange(seq_lens.shape[0], dtype=jnp.int32)
    return Queries((seq_lens - 1)[:, None], rows, seq_lens)


def tile_queries(
    positions: Int[Array, " T"],
    tiles: TileMap,
    take: Int[Array, " N"],
    variant: AttentionVariant,
    seq_lens: Int[Array, " R"] | None,
) -> tuple[Int[Array, "N S"], Queries]:
    """The tiles' tokens, 0 for padding."""
    token = tiles.start[take][:, None] + jnp.arange(TILE)[None]
    valid = token < tiles.stop[take][:, None]
    token = jnp.where(valid, token, 0)
    position = jnp.where(valid, positions[token], -1)
    slot = tiles.slot[take]
    written = jnp.max(position, axis=1) + 1
    if variant.lookahead and seq_lens is not None:
        written = jnp.where(written > 0, seq_lens[slot], 0)
    return token, Queries(position, slot, written)


class Mods(NamedTuple):
    scale: float
    window: int | None
    variant: AttentionVariant
    params: Params
    value_dim: int | None


class Pairs(NamedTuple):
    """Positions and heads of scores [N, K, Q, C], as they broadcast with them."""

    query: Int[Array, "N 1 Q 1"]
    key: Int[Array, "_N 1 1 C"]
    head: Int[Array, "1 K Q 1"]

    @classmethod
    def of(
        cls, queries: Queries, kv_pos: Int[Array, "_N C"], kv_heads: int, groups: int
    ) -> "Pairs":
        q_pos = jnp.tile(queries.positions, (1, groups))[:, None, :, None]
        head = jnp.arange(kv_heads * groups, dtype=jnp.int32).reshape(kv_heads, groups)
        head = jnp.repeat(head, queries.positions.shape[1], axis=1)[None, :, :, None]
        return cls(q_pos, kv_pos[:, None, None], head)


def visible_pairs(
    pairs: Pairs, queries: Queries, mods: Mods, values: SimpleNamespace
) -> Bool[Array, "N _K Q C"]:
    query, key, variant = pairs.query, pairs.key, mods.variant
    if variant.lookahead:
        visible = (query >= 0) & (key < queries.written[:, None, None, None])
    else:
        visible = key <= query
    if mods.window is not None:
        visible &= key > query - mods.window
    if variant.mask_mod is not None:
        visible = visible & variant.mask_mod(query, key, pairs.head, values)
    return visible


def param_values(
    pairs: Pairs, rows: Int[Array, " N"], mods: Mods, tokens: Mapping[str, OfPair] | None = None
) -> SimpleNamespace:
    """The params, each of a shape that broadcasts with the scores."""
    values: dict[str, Array | tuple[Array, ...]] = dict(tokens or {})
    for param in mods.variant.array_params:
        array = mods.params[param.name]
        match param.kind:
            case "per_head":
                values[param.name] = array[pairs.head]
            case "per_layer":
                values[param.name] = array
            case "per_distance":
                distance = jnp.clip(pairs.query - pairs.key, 0, array.shape[1] - 1)
                values[param.name] = array[pairs.head, distance]
            case "per_row":
                mine = array[rows][:, None, None, None]  # [N, 1, 1, 1], and the size at last
                sized = param.size is not None
                values[param.name] = tuple(jnp.moveaxis(mine, -1, 0)) if sized else mine
    return SimpleNamespace(**values)


def pages_per_span(page_size: int, max_pages: int) -> int:
    return max(1, min(SPAN // page_size, max_pages))
