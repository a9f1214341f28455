"""Paged attention in plain XLA: walks pages in a loop with a dynamic bound and online softmax.

Cost follows the longest context in the batch, not the size of the block table, and no copy of
the gathered cache exists. Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

TILE = 32  # queries of one row that are attended together in prefill
SPAN = 128  # key positions per loop iteration
_MASKED = -1e30


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


def paged_decode(
    q: Float[Array, "R H D"],
    kv: Float[Array, "P 2 K B D"],
    block_tables: Int[Array, "R M"],
    seq_lens: Int[Array, " R"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "R H D"]:
    """One query per row, at position ``seq_lens - 1``. Rows with seq_len 0 return zeros."""
    positions = (seq_lens - 1)[:, None]
    return _walk(q[:, None], positions, kv, block_tables, scale, window)[:, 0]


def paged_prefill(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P 2 K B D"],
    block_tables: Int[Array, "R M"],
    positions: Int[Array, " T"],
    tiles: TileMap,
    out: Float[Array, "T H D"],
    *,
    scale: float,
    window: int | None = None,
    group: int = 1,
) -> Float[Array, "T H D"]:
    """Attends all tokens covered by ``tiles`` and returns ``out`` with their rows replaced.

    ``group`` tiles are attended at once: 1 suits a CPU, many fill an accelerator.
    """
    tokens = q.shape[0]
    count = tiles.slot.shape[0]
    group = min(group, count)

    def body(index: Int[Array, ""], out: Float[Array, "T H D"]) -> Float[Array, "T H D"]:
        take = jnp.minimum(index * group + jnp.arange(group), count - 1)
        token = tiles.start[take][:, None] + jnp.arange(TILE)[None]
        valid = token < tiles.stop[take][:, None]
        token = jnp.where(valid, token, 0)
        position = jnp.where(valid, positions[token], -1)
        tables = block_tables[tiles.slot[take]]
        result = _walk(q[token], position, kv, tables, scale, window)
        target = jnp.where(valid, token, tokens).reshape(-1)  # out of range: dropped
        return out.at[target].set(result.reshape(-1, *q.shape[1:]), mode="drop")

    return lax.fori_loop(0, (tiles.count + group - 1) // group, body, out)


class _Softmax(NamedTuple):
    """Running state over keys seen so far; Q = queries of a tile times grouped heads."""

    accumulated: Float[Array, "N K Q D"]
    maximum: Float[Array, "N K Q"]
    total: Float[Array, "N K Q"]


def _walk(
    q: Float[Array, "N S H D"],
    positions: Int[Array, "N S"],
    kv: Float[Array, "P 2 K B D"],
    block_tables: Int[Array, "N M"],
    scale: float,
    window: int | None,
) -> Float[Array, "N S H D"]:
    """S queries of each of N rows against that row's pages; position -1 marks padding."""
    n, s, heads, dim = q.shape
    kv_heads, page_size = kv.shape[2], kv.shape[3]
    groups = heads // kv_heads
    pages = max(1, min(SPAN // page_size, block_tables.shape[1]))  # pages per iteration
    span = pages * page_size
    queries = q.reshape(n, s, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(n, kv_heads, groups * s, dim)
    row_end = jnp.max(positions, axis=1) + 1  # keys at or past it were never written for this row
    begin = jnp.int32(0)
    if window is not None:
        first = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions - window + 1)
        begin = jnp.maximum(jnp.min(first), 0) // span

    def body(index: Int[Array, ""], state: _Softmax) -> _Softmax:
        wanted = jnp.minimum(index * pages + jnp.arange(pages), block_tables.shape[1] - 1)
        block = kv[block_tables[:, wanted]]  # [N, pages, 2, K, B, D]
        block = block.transpose(2, 0, 3, 1, 4, 5).reshape(2, n, kv_heads, span, dim)
        kv_pos = index * span + jnp.arange(span)
        # Pages are reused: what lies past a row's end may be another request's NaN, and 0 * NaN is
        # NaN.
        written = (kv_pos[None] < row_end[:, None])[:, None, :, None]
        visible = _visible(kv_pos, positions, window, groups)
        return _update(queries, block[0], jnp.where(written, block[1], 0), visible, scale, state)

    shape = (n, kv_heads, groups * s)
    state = _Softmax(
        jnp.zeros((*shape, dim), jnp.float32),
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    state = lax.fori_loop(begin, (jnp.max(row_end) + span - 1) // span, body, state)
    out = state.accumulated / jnp.maximum(state.total, 1e-30)[..., None]
    out = out.reshape(n, kv_heads, groups, s, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(n, s, heads, dim).astype(q.dtype)


def _visible(
    kv_pos: Int[Array, " C"], positions: Int[Array, "N S"], window: int | None, groups: int
) -> Bool[Array, "N 1 Q C"]:
    visible = kv_pos[None, None] <= positions[:, :, None]
    if window is not None:
        visible &= kv_pos[None, None] > positions[:, :, None] - window
    return jnp.tile(visible, (1, groups, 1))[:, None]


def _update(
    queries: Float[Array, "N K Q D"],
    keys: Float[Array, "N K C D"],
    values: Float[Array, "N K C D"],
    visible: Bool[Array, "N 1 Q C"],
    scale: float,
    state: _Softmax,
) -> _Softmax:
    scores = jnp.einsum("nkqd,nkcd->nkqc", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * scale, _MASKED)
    maximum = jnp.maximum(state.maximum, scores.max(axis=-1))
    weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0.0)
    decay = jnp.exp(state.maximum - maximum)
    added = jnp.einsum(
        "nkqc,nkcd->nkqd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return _Softmax(
        state.accumulated * decay[..., None] + added,
        maximum,
        state.total * decay + weights.sum(axis=-1),
    )
