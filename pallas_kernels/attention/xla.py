"""Paged attention in plain XLA: walks pages in a loop with a dynamic bound and online softmax.

Cost follows the longest context in the batch, not the size of the block table, and no copy of
the gathered cache exists. Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from types import SimpleNamespace
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_params import Params, kv_spans, param_arrays
from pallas_kernels.kv_write.narrow import widened

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
    variant: AttentionVariant = CAUSAL,
    row_params: Params | None = None,
) -> Float[Array, "R H D"]:
    """One query per row, at position ``seq_lens - 1``. Rows with seq_len 0 return zeros.
    ``row_params`` is what rows bring of the variant's params, see ``param_arrays``."""
    positions = (seq_lens - 1)[:, None]
    rows = jnp.arange(seq_lens.shape[0], dtype=jnp.int32)
    queries = _Queries(q[:, None], positions, rows, seq_lens)
    params = param_arrays(variant, q.shape[1], seq_lens.shape[0], row_params)
    mods = _Mods(scale, window, variant, params)
    return _walk(queries, kv, block_tables, mods)[:, 0]


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
    variant: AttentionVariant = CAUSAL,
    row_params: Params | None = None,
    seq_lens: Int[Array, " R"] | None = None,
) -> Float[Array, "T H D"]:
    """Attends all tokens covered by ``tiles`` and returns ``out`` with their rows replaced.

    ``group`` tiles are attended at once: 1 suits a CPU, many fill an accelerator. A variant with
    lookahead needs ``seq_lens``: how far each row has been written.
    """
    tokens = q.shape[0]
    count = tiles.slot.shape[0]
    group = min(group, count)
    params = param_arrays(variant, q.shape[1], block_tables.shape[0], row_params)
    mods = _Mods(scale, window, variant, params)

    def body(index: Int[Array, ""], out: Float[Array, "T H D"]) -> Float[Array, "T H D"]:
        take = jnp.minimum(index * group + jnp.arange(group), count - 1)
        token = tiles.start[take][:, None] + jnp.arange(TILE)[None]
        valid = token < tiles.stop[take][:, None]
        token = jnp.where(valid, token, 0)
        position = jnp.where(valid, positions[token], -1)
        slot = tiles.slot[take]
        written = jnp.max(position, axis=1) + 1
        if variant.lookahead and seq_lens is not None:
            written = jnp.where(written > 0, seq_lens[slot], 0)
        queries = _Queries(q[token], position, slot, written)
        result = _walk(queries, kv, block_tables[slot], mods)
        target = jnp.where(valid, token, tokens).reshape(-1)  # out of range: dropped
        return out.at[target].set(result.reshape(-1, *q.shape[1:]), mode="drop")

    return lax.fori_loop(0, (tiles.count + group - 1) // group, body, out)


class _Queries(NamedTuple):
    """S queries of each of N rows; position -1 marks padding."""

    q: Float[Array, "N S H D"]
    positions: Int[Array, "N S"]
    rows: Int[Array, " N"]
    written: Int[Array, " N"]  # keys at or past it are not this row's


class _Mods(NamedTuple):
    scale: float
    window: int | None
    variant: AttentionVariant
    params: Params


class _Softmax(NamedTuple):
    """Running state over keys seen so far; Q = queries of a tile times grouped heads."""

    accumulated: Float[Array, "N K Q D"]
    maximum: Float[Array, "N K Q"]
    total: Float[Array, "N K Q"]


def _walk(
    queries: _Queries, kv: Float[Array, "P 2 K B D"], block_tables: Int[Array, "N M"], mods: _Mods
) -> Float[Array, "N S H D"]:
    """Queries against their rows' pages."""
    n, s, heads, dim = queries.q.shape
    kv_heads, page_size = kv.shape[2], kv.shape[3]
    groups = heads // kv_heads
    pages = max(1, min(SPAN // page_size, block_tables.shape[1]))  # pages per iteration
    span = pages * page_size
    packed = queries.q.reshape(n, s, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    packed = packed.reshape(n, kv_heads, groups * s, dim)
    begin, end = _bounds(queries, mods)

    def body(index: Int[Array, ""], state: _Softmax) -> _Softmax:
        wanted = jnp.minimum(index * pages + jnp.arange(pages), block_tables.shape[1] - 1)
        block = kv[block_tables[:, wanted]]  # [N, pages, 2, K, B, D]
        block = (
            widened(block, packed.dtype)
            .transpose(2, 0, 3, 1, 4, 5)
            .reshape(2, n, kv_heads, span, dim)
        )
        kv_pos = index * span + jnp.arange(span)
        # Pages are reused: what lies past a row's end may be another request's NaN, and 0 * NaN is
        # NaN.
        written = (kv_pos[None] < queries.written[:, None])[:, None, :, None]
        keys, values = block[0], jnp.where(written, block[1], 0)
        scores = jnp.einsum("nkqd,nkcd->nkqc", packed, keys, preferred_element_type=jnp.float32)
        scores, visible = _logits(scores * mods.scale, kv_pos, queries, mods)
        return _update(scores, visible, values, state)

    shape = (n, kv_heads, groups * s)
    state = _Softmax(
        jnp.zeros((*shape, dim), jnp.float32),
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    state = lax.fori_loop(begin // span, (end + span - 1) // span, body, state)
    if mods.variant.sinks is not None:
        state = _add_sinks(mods.params[mods.variant.sinks], s, state)
    out = state.accumulated / jnp.maximum(state.total, 1e-30)[..., None]
    out = out.reshape(n, kv_heads, groups, s, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(n, s, heads, dim).astype(queries.q.dtype)


def _bounds(queries: _Queries, mods: _Mods) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """First and last + 1 position that any query sees."""
    positions, window = queries.positions, mods.window
    if mods.variant.kv_range is None:
        begin = jnp.int32(0)
        if window is not None:
            first = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions - window + 1)
            begin = jnp.maximum(jnp.min(first), 0)
        return begin, jnp.max(queries.written)
    last = jnp.max(positions, axis=1)
    first = jnp.min(jnp.where(positions < 0, last[:, None], positions), axis=1)
    spans = kv_spans(mods.variant, mods.params, queries.rows, first, last, queries.written, window)
    empty = spans.end == 0
    begin = jnp.min(jnp.where(empty, jnp.iinfo(jnp.int32).max, spans.begin))
    end = jnp.max(spans.end)
    return jnp.minimum(begin, end), end


def _logits(
    scores: Float[Array, "N K Q C"], kv_pos: Int[Array, " C"], queries: _Queries, mods: _Mods
) -> tuple[Float[Array, "N K Q C"], Bool[Array, "N _K Q C"]]:
    """Scores as the variant wants them, and what is visible."""
    variant, kv_heads = mods.variant, scores.shape[1]
    s = queries.positions.shape[1]
    groups = scores.shape[2] // s
    q_pos = jnp.tile(queries.positions, (1, groups))[:, None, :, None]
    key = kv_pos[None, None, None]
    if variant.lookahead:
        visible = (q_pos >= 0) & (key < queries.written[:, None, None, None])
    else:
        visible = key <= q_pos
    if mods.window is not None:
        visible &= key > q_pos - mods.window
    if variant.score_mod is None and variant.mask_mod is None:
        return scores, visible
    head = jnp.arange(kv_heads * groups, dtype=jnp.int32).reshape(kv_heads, groups)
    head = jnp.repeat(head, s, axis=1)[None, :, :, None]
    values = _values(head, q_pos - key, queries.rows, mods)
    if variant.score_mod is not None:
        changed = variant.score_mod(scores, q_pos, key, head, values)
        scores = jnp.broadcast_to(changed.astype(jnp.float32), scores.shape)
    if variant.mask_mod is not None:
        visible = visible & variant.mask_mod(q_pos, key, head, values)
    return scores, visible


def _values(
    head: Int[Array, "1 K Q 1"],
    distance: Int[Array, "N 1 Q C"],
    rows: Int[Array, " N"],
    mods: _Mods,
) -> SimpleNamespace:
    """The params, each of a shape that broadcasts with the scores."""
    values: dict[str, Array | tuple[Array, ...]] = {}
    for param in mods.variant.params:
        array = mods.params[param.name]
        match param.kind:
            case "per_head":
                values[param.name] = array[head]
            case "per_layer":
                values[param.name] = array
            case "per_distance":
                values[param.name] = array[head, jnp.clip(distance, 0, array.shape[1] - 1)]
            case "per_row":
                mine = array[rows][:, None, None, None]  # [N, 1, 1, 1], and the size at last
                sized = param.size is not None
                values[param.name] = tuple(jnp.moveaxis(mine, -1, 0)) if sized else mine
    return SimpleNamespace(**values)


def _add_sinks(logits: Float[Array, " H"], queries: int, state: _Softmax) -> _Softmax:
    sink = jnp.repeat(logits.reshape(state.total.shape[1], -1), queries, axis=1)[None]
    maximum = jnp.maximum(state.maximum, sink)
    decay = jnp.exp(state.maximum - maximum)
    total = state.total * decay + jnp.exp(sink - maximum)
    return _Softmax(state.accumulated * decay[..., None], maximum, total)


def _update(
    scores: Float[Array, "N K Q C"],
    visible: Bool[Array, "N _K Q C"],
    values: Float[Array, "N K C D"],
    state: _Softmax,
) -> _Softmax:
    scores = jnp.where(visible, scores, _MASKED)
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
