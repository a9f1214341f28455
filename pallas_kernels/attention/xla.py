"""Paged attention in plain XLA: walks pages in a loop with a dynamic bound and online softmax.

Cost follows the longest context in the batch, not the size of the block table, and no copy of
the gathered cache exists. Online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.variant import CAUSAL, AttentionVariant
from pallas_kernels.attention.variant_params import (
    OfPair,
    Params,
    TokenValues,
    kv_spans,
    param_arrays,
)
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
from pallas_kernels.attention.xla_spans import (
    Sight,
    SpanMap,
    decode_spans,
    prefill_spans,
)
from pallas_kernels.kv_write.narrow import widened

_MASKED = -1e30

# Of shapes below: pages hold keys and values (S = 2, values as wide as keys, V = D), or keys alone
# (S = 1), of which the first V = ``value_dim`` channels are the values.


def paged_decode(
    q: Float[Array, "R H D"],
    kv: Float[Array, "P S K B D"],
    block_tables: Int[Array, "R M"],
    seq_lens: Int[Array, " R"],
    *,
    scale: float,
    window: int | None = None,
    variant: AttentionVariant = CAUSAL,
    row_params: Params | None = None,
    value_dim: int | None = None,
    spans: SpanMap | None = None,
    tokens: TokenValues | None = None,
) -> Float[Array, "R H V"]:
    """One query per row, at position ``seq_lens - 1``. Rows with seq_len 0 return zeros.
    ``row_params`` is what rows bring of the variant's params, see ``param_arrays``; ``spans``
    what ``decode_spans`` gave, or gives here; ``tokens`` a variant's per_token params."""
    if spans is None and variant.is_mapped:
        sight = Sight(window, variant, row_params, kv.shape[3], block_tables.shape)
        spans = decode_spans(seq_lens, q.shape[1], sight)
    params = param_arrays(variant, q.shape[1], seq_lens.shape[0], row_params)
    mods = Mods(scale, window, variant, params, value_dim)
    if tokens is not None:
        tokens = tokens._replace(queries=tokens.queries[:, None])
    queries = decode_queries(seq_lens)
    return _walk(q[:, None], queries, kv, block_tables, mods, spans, tokens)[:, 0]


def paged_prefill(
    q: Float[Array, "T H D"],
    kv: Float[Array, "P S K B D"],
    block_tables: Int[Array, "R M"],
    positions: Int[Array, " T"],
    tiles: TileMap,
    out: Float[Array, "T H V"],
    *,
    scale: float,
    window: int | None = None,
    group: int = 1,
    variant: AttentionVariant = CAUSAL,
    row_params: Params | None = None,
    seq_lens: Int[Array, " R"] | None = None,
    value_dim: int | None = None,
    spans: SpanMap | None = None,
    tokens: TokenValues | None = None,
) -> Float[Array, "T H V"]:
    """Attends all tokens covered by ``tiles`` and returns ``out`` with their rows replaced.

    ``group`` tiles are attended at once: 1 suits a CPU, many fill an accelerator. A variant with
    lookahead needs ``seq_lens``: how far each row has been written. ``spans`` is what
    ``prefill_spans`` gave, or gives here; ``tokens`` a variant's per_token params.
    """
    if spans is None and variant.is_mapped:
        sight = Sight(window, variant, row_params, kv.shape[3], block_tables.shape)
        spans = prefill_spans(positions, tiles, seq_lens, q.shape[1], sight)
    total, count = q.shape[0], tiles.slot.shape[0]
    group = min(group, count)
    params = param_arrays(variant, q.shape[1], block_tables.shape[0], row_params)
    mods = Mods(scale, window, variant, params, value_dim)

    def body(index: Int[Array, ""], out: Float[Array, "T H V"]) -> Float[Array, "T H V"]:
        take = jnp.minimum(index * group + jnp.arange(group), count - 1)
        token, queries = tile_queries(positions, tiles, take, variant, seq_lens)
        mine = None if spans is None else SpanMap(spans.order[take], spans.count[take])
        own = tokens if tokens is None else tokens._replace(queries=tokens.queries[token])
        result = _walk(q[token], queries, kv, block_tables[queries.rows], mods, mine, own)
        target = jnp.where(queries.positions < 0, total, token).reshape(-1)  # too large: dropped
        return out.at[target].set(result.reshape(-1, *out.shape[1:]), mode="drop")

    return lax.fori_loop(0, (tiles.count + group - 1) // group, body, out)


class _Softmax(NamedTuple):
    """Running state over keys seen so far; Q = queries of a tile times grouped heads."""

    accumulated: Float[Array, "N K Q V"]
    maximum: Float[Array, "N K Q"]
    total: Float[Array, "N K Q"]


def _walk(
    q: Float[Array, "N S H D"],
    queries: Queries,
    kv: Float[Array, "P S K B D"],
    block_tables: Int[Array, "N M"],
    mods: Mods,
    spans: SpanMap | None,
    tokens: TokenValues | None,
) -> Float[Array, "N S H V"]:
    """Queries against their rows' pages; every row at its own stretch if there are ``spans``.
    ``tokens.queries`` is of every query, [N, S, params, K]."""
    n, s, heads, dim = q.shape
    value_dim = mods.value_dim or dim
    kv_heads, page_size = kv.shape[2], kv.shape[3]
    groups = heads // kv_heads
    pages = pages_per_span(page_size, block_tables.shape[1])
    span = pages * page_size
    packed = q.reshape(n, s, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)
    packed = packed.reshape(n, kv_heads, groups * s, dim)
    if spans is None:
        begin, end = _bounds(queries, mods)
        first, last = begin // span, (end + span - 1) // span
    else:
        first, last = jnp.int32(0), jnp.max(spans.count)

    def body(index: Int[Array, ""], state: _Softmax) -> _Softmax:
        at = index[None] if spans is None else spans.order[:, index]  # [1] or [N]
        wanted = jnp.minimum(
            at[:, None] * pages + jnp.arange(pages)[None], block_tables.shape[1] - 1
        )
        wanted = jnp.broadcast_to(wanted, (n, pages))
        here = jnp.take_along_axis(block_tables, wanted, axis=1)
        block = kv[here]  # [N, pages, S, K, B, D]
        block = widened(block, packed.dtype).transpose(2, 0, 3, 1, 4, 5)
        block = block.reshape(-1, n, kv_heads, span, dim)
        kv_pos = at[:, None] * span + jnp.arange(span)[None]
        # Pages are reused: what lies past a row's end may be another request's NaN, and 0 * NaN is
        # NaN.
        written = (kv_pos < queries.written[:, None])[:, None, :, None]
        keys, values = block[0], jnp.where(written, block[-1, ..., :value_dim], 0)
        scores = jnp.einsum("nkqd,nkcd->nkqc", packed, keys, preferred_element_type=jnp.float32)
        numbers = _token_pairs(tokens, here, groups, mods)
        scores, visible = _logits(scores * mods.scale, kv_pos, queries, mods, numbers)
        return _update(scores, visible, values, state)

    shape = (n, kv_heads, groups * s)
    state = _Softmax(
        jnp.zeros((*shape, value_dim), jnp.float32),
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    state = lax.fori_loop(first, last, body, state)
    if mods.variant.sinks is not None:
        state = _add_sinks(mods.params[mods.variant.sinks], s, state)
    out = state.accumulated / jnp.maximum(state.total, 1e-30)[..., None]
    out = out.reshape(n, kv_heads, groups, s, value_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(n, s, heads, value_dim).astype(q.dtype)


def _bounds(queries: Queries, mods: Mods) -> tuple[Int[Array, ""], Int[Array, ""]]:
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


def _token_pairs(
    tokens: TokenValues | None, pages: Int[Array, "N W"], groups: int, mods: Mods
) -> dict[str, OfPair]:
    """The per_token params as they broadcast with scores [N, K, Q, C], of the keys in ``pages``."""
    if tokens is None:
        return {}
    key = jnp.moveaxis(tokens.pages[pages], 1, 3)  # [N, params, K, W, B]
    key = key.reshape(*key.shape[:3], 1, -1)
    query = jnp.moveaxis(tokens.queries, 1, 3)  # [N, params, K, S]
    query = jnp.tile(query, (1, 1, 1, groups))[..., None]
    named = enumerate(mods.variant.token_params)
    return {param.name: OfPair(query[:, i], key[:, i]) for i, param in named}


def _logits(
    scores: Float[Array, "N K Q C"],
    kv_pos: Int[Array, "_N C"],
    queries: Queries,
    mods: Mods,
    tokens: dict[str, OfPair],
) -> tuple[Float[Array, "N K Q C"], Bool[Array, "N _K Q C"]]:
    """Scores as the variant wants them, and what is visible."""
    variant, kv_heads = mods.variant, scores.shape[1]
    groups = scores.shape[2] // queries.positions.shape[1]
    pairs = Pairs.of(queries, kv_pos, kv_heads, groups)
    values = param_values(pairs, queries.rows, mods, tokens)
    if variant.score_mod is not None:
        changed = variant.score_mod(scores, pairs.query, pairs.key, pairs.head, values)
        scores = jnp.broadcast_to(changed.astype(jnp.float32), scores.shape)
    return scores, visible_pairs(pairs, queries, mods, values)


def _add_sinks(logits: Float[Array, " H"], queries: int, state: _Softmax) -> _Softmax:
    sink = jnp.repeat(logits.reshape(state.total.shape[1], -1), queries, axis=1)[None]
    maximum = jnp.maximum(state.maximum, sink)
    decay = jnp.exp(state.maximum - maximum)
    total = state.total * decay + jnp.exp(sink - maximum)
    return _Softmax(state.accumulated * decay[..., None], maximum, total)


def _update(
    scores: Float[Array, "N K Q C"],
    visible: Bool[Array, "N _K Q C"],
    values: Float[Array, "N K C V"],
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
