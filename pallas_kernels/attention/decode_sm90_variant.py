"""A variant's functions on the score tiles [tokens, heads] of the decode kernel."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.decode_sm90_items import DecodeOp, DecodeShape, Item
from pallas_kernels.attention.decode_sm90_sums import WGMMA, Ref, Sum, across, sink_sum
from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_params import (
    OfPair,
    Params,
    by_position,
    head_columns,
    slice_start,
    spread,
)
from pallas_kernels.attention.written_out import written_out


def decode_operands(variant: AttentionVariant, arrays: Params, shape: DecodeShape) -> list[Array]:
    """The params as the kernel reads them, in order of declaration: per_head [K, N], per_layer [1],
    per_row as it is, per_distance [K, positions, N]."""
    operands: list[Array] = []
    for param in variant.array_params:
        value = arrays[param.name]
        if param.kind == "per_layer":
            value = value[None]
        elif param.kind != "per_row":
            if param.kind == "per_distance":
                value = by_position(value, shape.block)
            value = head_columns(value, shape.kv_heads, shape.padded)
        operands.append(value)
    return operands


class DecodeMods:
    """The functions, with the params of one item: read once, before its blocks."""

    def __init__(
        self,
        op: DecodeOp,
        shape: DecodeShape,
        refs: tuple[Ref, ...],
        item: Item,
        own: tuple[Ref, Ref] | None,
    ):
        self._op, self._shape, self._item = op, shape, item
        self._tables: dict[str, tuple[Ref, int]] = {}
        self._columns: dict[str, Array] = {}
        self._scalars: dict[str, Any] = {}
        self._own: list[Array] = []
        if own is not None:
            pages, tables = own
            query, page = lax.max(item.query, jnp.int32(0)), jnp.int32(shape.page)
            where, at = tables[item.row, lax.div(query, page)], lax.rem(query, page)
            self._own = [pages[where, i, item.head, at] for i in range(shape.numbers)]
        for param, ref in zip(op.variant.array_params, refs, strict=True):
            match param.kind:
                case "per_distance":
                    self._tables[param.name] = (ref, param.size or 0)
                case "per_head":
                    self._columns[param.name] = plgpu.load(
                        ref.at[item.head], layout=WGMMA.reduce(0), optimized=False
                    )
                case "per_layer":
                    self._scalars[param.name] = ref[0]
                case "per_row" if param.size is None:
                    self._scalars[param.name] = ref[item.row]
                case "per_row":
                    values = tuple(ref[item.row, i] for i in range(param.size or 0))
                    self._scalars[param.name] = values

    def __call__(
        self, scores: Array, token: Array, position: Array, numbers: list[Array]
    ) -> tuple[Array, Array | None]:
        """Logits and what is visible of a block (None: all) that begins at ``position``; ``token``
        holds the positions of the tile, ``numbers`` the per_token params of its keys."""
        variant, item, shape = self._op.variant, self._item, self._shape
        if variant.score_mod is None and variant.mask_mod is None:
            return scores, None
        query = item.query
        columns = {name: across(value, scores) for name, value in self._columns.items()}
        params = SimpleNamespace(**self._scalars, **columns, **self._at(item.query, position))
        for param, own, keys in zip(variant.token_params, self._own, numbers, strict=True):
            spread_keys = lax.broadcast_in_dim(keys, scores.shape, (0,))
            setattr(params, param.name, OfPair(own, spread_keys))
        head = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
        head = head + item.head * shape.group
        if variant.score_mod is not None:
            score_mod = written_out(variant.score_mod)
            scores = score_mod(scores, query, token, head, params)
            scores = spread(scores.astype(jnp.float32), token.shape)
        if variant.mask_mod is None:
            return scores, None
        mask_mod = written_out(variant.mask_mod)
        return scores, spread(mask_mod(query, token, head, params), token.shape)

    @property
    def sink(self) -> Sum | None:
        """What is joined to the sum of a whole row, last."""
        name = self._op.variant.sinks
        return None if name is None else sink_sum(self._columns[name], self._shape.columns)

    def _at(self, query: Array, position: Array) -> dict[str, Array]:
        tiles: dict[str, Array] = {}
        for name, (ref, size) in self._tables.items():
            start = slice_start(query, position, size, self._shape.block)
            rows = ref.at[self._item.head, pl.ds(start, self._shape.block)]
            tiles[name] = plgpu.load(rows, layout=WGMMA, optimized=False)
        return tiles
