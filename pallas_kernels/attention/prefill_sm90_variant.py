"""A variant's functions on the score tiles [queries, keys] of the prefill kernel."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.decode_sm90_sums import LOG2E
from pallas_kernels.attention.mask_bounds import Bounds, seen_whole
from pallas_kernels.attention.page_map import PageMap
from pallas_kernels.attention.prefill_sm90_items import WGMMA, Gmem, Item, PrefillOp, kv_head_of
from pallas_kernels.attention.prefill_tiles import ROWS
from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_params import (
    OfPair,
    Params,
    TokenValues,
    by_position,
    kv_spans,
    slice_start,
    spread,
)


def prefill_operands(
    variant: AttentionVariant,
    arrays: Params,
    table: Int[Array, "N F"],
    op: PrefillOp,
    page_map: PageMap | None,
    tokens: TokenValues | None,
) -> list[Array]:
    """The params as the kernel reads them, in order of declaration: per_head [H], per_layer [1],
    per_row as it is, per_distance [H, 2, ROWS, positions]; if ranged the tiles' spans, if mapped
    their map, and of per_token params pages and the queries' [N, K, T].
    """
    operands: list[Array] = []
    for param in variant.array_params:
        value = arrays[param.name]
        if param.kind == "per_layer":
            value = value[None]
        elif param.kind == "per_distance":
            value = _diagonals(value, op.config.block_kv)
        operands.append(value)
    if op.ranged:
        operands.append(_tile_spans(variant, arrays, table, op))
    if page_map is not None:
        operands += page_map
    if tokens is not None:
        operands += [tokens.pages, jnp.moveaxis(tokens.queries, 0, 2)]
    return operands


def _diagonals(table: Float[Array, "H size"], block: int) -> Float[Array, "H 2 ROWS positions"]:
    """Row i is shifted by i: a tile of queries and keys needs a rectangle. Twice, the second moved
    by one: threads load pairs of numbers, which begin at even places."""
    line = by_position(table, _edge(block))
    width = (line.shape[1] - ROWS) // 2 * 2 + 2
    line = jnp.pad(line, ((0, 0), (0, 3)), mode="edge")
    starts = [[ROWS - row + odd for row in range(ROWS)] for odd in range(2)]
    shifts = [[line[:, start : start + width] for start in both] for both in starts]
    return jnp.stack([jnp.stack(rows, axis=1) for rows in shifts], axis=1)


def _edge(block: int) -> int:
    return block + ROWS


def _tile_spans(
    variant: AttentionVariant, arrays: Params, table: Int[Array, "N F"], op: PrefillOp
) -> Int[Array, "N 2"]:
    """Of whole tiles. ``lookahead`` alone makes a span of all that has been written."""
    slot, _, position, low, high, written, *_ = table.T
    first, last = position + low, position + high - 1
    return jnp.stack(kv_spans(variant, arrays, slot, first, last, written, op.window), axis=1)


class PrefillMods:
    """The functions, with the params of one head and tile: read once, before its blocks."""

    def __init__(self, op: PrefillOp, gmem: Gmem, item: Item, head: Array, row: Array):
        self._op, self._head, self.item = op, head, item
        self._own: list[Array] = []
        self._token_names = [param.name for param in op.variant.token_params]
        self._row = row
        for index in range(len(op.variant.token_params)):
            queries = pl.ds(item.token + row, ROWS)
            ref = gmem.token_queries.at[index, kv_head_of(gmem, head), queries]
            own = plgpu.load(ref, layout=WGMMA.reduce(1), optimized=False)
            self._own.append(own)
        self._tables: dict[str, tuple[Any, int]] = {}
        self._scalars: dict[str, Any] = {}
        for param, ref in zip(op.variant.array_params, gmem.params, strict=True):
            match param.kind:
                case "per_distance":
                    self._tables[param.name] = (ref, param.size or 0)
                case "per_head":
                    self._scalars[param.name] = ref[head]
                case "per_layer":
                    self._scalars[param.name] = ref[0]
                case "per_row" if param.size is None:
                    self._scalars[param.name] = ref[item.slot]
                case "per_row":
                    values = tuple(ref[item.slot, i] for i in range(param.size or 0))
                    self._scalars[param.name] = values

    def score(self, scores: Array, position: Array, key: Array, numbers: list[Array]) -> Array:
        """Logits of queries from ``position`` on and keys from ``key`` on. ``numbers``: the keys'
        per_token params."""
        score_mod = self._op.variant.score_mod
        if score_mod is None:
            return scores
        query, token = _positions(scores.shape, position, key)

        def modified(scores: Array, tables: dict[str, Array]) -> Array:
            params = self._params(scores.shape, numbers, tables)
            found = score_mod(scores, query, token, self._head, params)
            return spread(found.astype(jnp.float32), token.shape)

        def near(scores: Array) -> Array:
            return modified(scores, self._at(position, key))

        if not self._tables:
            return modified(scores, {})
        # Behind the longest table each is one number.
        distance = self._first(position) - (key + self._op.config.block_kv - 1)
        sizes = [size for _, size in self._tables.values()]
        far = {name: ref[self._head, 0, 0, 0] for name, (ref, _) in self._tables.items()}
        is_far = distance >= max(sizes) - 1
        return lax.cond(is_far, lambda scores: modified(scores, far), near, scores)

    def seen(
        self, shape: tuple[int, ...], position: Array, key: Array, numbers: list[Array]
    ) -> Array:
        """What the variant's mask lets be seen."""
        query, token = _positions(shape, position, key)
        params = self._params(shape, numbers, self._at(position, key))
        mask_mod: Any = self._op.variant.mask_mod
        return spread(mask_mod(query, token, self._head, params), token.shape)

    def seen_whole(self, position: Array, key: Array) -> Array | None:
        """Whether the variant's mask surely hides nothing of a block from the tile's own rows; None
        if that can never be said."""
        unknown = {name: None for name in (*self._tables, *self._token_names)}
        params = SimpleNamespace(**self._scalars, **unknown)
        query = Bounds(self._first(position), self._last(position))
        token = Bounds(key, key + self._op.config.block_kv - 1)
        mask_mod: Any = self._op.variant.mask_mod
        return seen_whole(mask_mod, query, token, self._head, params)

    def _first(self, position: Array) -> Array:
        """Where the tile's own rows begin, if those of the window do at ``position``."""
        return position + lax.max(self.item.low - self._row, jnp.int32(0))

    def _last(self, position: Array) -> Array:
        return position + lax.min(self.item.high - self._row, jnp.int32(ROWS)) - 1

    def is_past(self, position: Array, key: Array) -> Array:
        """Whether all keys of a block come before all queries, and within the model's window."""
        end = key + self._op.config.block_kv
        if self._op.variant.lookahead:
            past = end <= self.item.seq_len
        else:
            past = end - 1 <= self._first(position)
        if self._op.window is not None:
            past &= key > self._last(position) - self._op.window
        return past

    def _params(
        self, shape: tuple[int, ...], numbers: list[Array], tables: dict[str, Array]
    ) -> SimpleNamespace:
        params = SimpleNamespace(**self._scalars, **tables)
        for name, own, keys in zip(self._token_names, self._own, numbers, strict=True):
            query_values = lax.broadcast_in_dim(own, shape, (0,))
            setattr(params, name, OfPair(query_values, lax.broadcast_in_dim(keys, shape, (1,))))
        return params

    def _at(self, position: Array, key: Array) -> dict[str, Array]:
        tiles: dict[str, Array] = {}
        block = self._op.config.block_kv
        for name, (ref, size) in self._tables.items():
            start = slice_start(position, key, size, _edge(block), ROWS) - ROWS
            odd = lax.rem(start, jnp.int32(2))
            rectangle = ref.at[self._head, odd, :, pl.ds(start - odd, block)]
            tiles[name] = plgpu.load(rectangle, layout=WGMMA, optimized=False)
        return tiles

    def add_sink(self, accumulated: Array, maximum: Array, total: Array) -> tuple[Array, Array]:
        """A logit that takes part in softmax and has no value; maxima are in base 2."""
        name = self._op.variant.sinks
        if name is None:
            return accumulated, total
        logit = self._scalars[name] * LOG2E
        raised = jnp.maximum(maximum, logit)
        decay = jnp.exp2(maximum - raised)
        spread_decay = lax.broadcast_in_dim(decay, accumulated.shape, [0])
        total = total * decay + jnp.exp2(logit - raised)
        return accumulated * spread_decay, total


def _positions(shape: tuple[int, ...], position: Array, key: Array) -> tuple[Array, Array]:
    """Of a tile's queries and keys."""

    def index(dimension: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=WGMMA)

    return index(0) + position, index(1) + key
