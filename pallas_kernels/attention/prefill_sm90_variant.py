"""A variant's functions on the score tiles [queries, keys] of the prefill kernel."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.decode_sm90_sums import LOG2E
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

    def __call__(
        self, scores: Array, position: Array, key: Array, numbers: list[Array], *, masked: bool
    ) -> tuple[Array, Array | None]:
        """Logits, and what the variant lets be seen (None: all, or not ``masked``), of queries from
        ``position`` on and keys from ``key`` on. ``numbers``: the keys' per_token params."""
        variant = self._op.variant
        hides = masked and variant.mask_mod is not None
        if variant.score_mod is None and not hides:
            return scores, None

        def index(dimension: int) -> Array:
            return plgpu.broadcasted_iota(jnp.int32, scores.shape, dimension, layout=WGMMA)

        query, token = index(0) + position, index(1) + key
        params = SimpleNamespace(**self._scalars, **self._at(position, key))
        for param, own, keys in zip(variant.token_params, self._own, numbers, strict=True):
            query_values = lax.broadcast_in_dim(own, scores.shape, (0,))
            pair = OfPair(query_values, lax.broadcast_in_dim(keys, scores.shape, (1,)))
            setattr(params, param.name, pair)
        if variant.score_mod is not None:
            scores = variant.score_mod(scores, query, token, self._head, params)
            scores = spread(scores.astype(jnp.float32), token.shape)
        if variant.mask_mod is None or not masked:
            return scores, None
        return scores, spread(variant.mask_mod(query, token, self._head, params), token.shape)

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
