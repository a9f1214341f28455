"""A variant's functions on the score tiles [queries, keys] of the prefill kernel."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import eval_jaxpr
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array

from pallas_kernels.attention.decode_sm90_sums import LOG2E
from pallas_kernels.attention.mask_bounds import Bounds, seen_whole
from pallas_kernels.attention.pair_forms import Forms
from pallas_kernels.attention.pair_values import Apart, Positions, Tile, Value
from pallas_kernels.attention.prefill_sm90_items import WGMMA, Gmem, Item, PrefillOp, kv_head_of
from pallas_kernels.attention.prefill_sm90_operands import edge_of
from pallas_kernels.attention.prefill_tiles import ROWS
from pallas_kernels.attention.variant_params import (
    OfPair,
    slice_start,
)


class Logits(NamedTuple):
    """``scores * factor + shift`` in base 2. A shift [Q] of all logits of a query needs no
    operation on pairs."""

    scores: Array
    factor: float
    shift: Array | None


def _logits(forms: Forms, value: Value) -> Logits:
    if not isinstance(value, Tile) or value.pairs.dtype != jnp.float32:
        return Logits(forms.tile(value).astype(jnp.float32), LOG2E, None)
    rest = value.rest or Apart()
    shift = None
    if rest.queries is not None:
        shift = forms.along(replace(rest, keys=None), 0) * LOG2E
    elif rest.scalar is not None:
        shift = rest.scalar * LOG2E
    if rest.keys is None and isinstance(value.factor, np.floating) and value.factor > 0:
        return Logits(value.pairs, float(value.factor) * LOG2E, shift)
    own = None if rest.keys is None else Apart(keys=rest.keys)
    return Logits(forms.tile(replace(value, rest=own)), LOG2E, shift)


class PrefillMods:
    """The functions, with the params of one head and tile: read once, before its blocks."""

    def __init__(self, op: PrefillOp, gmem: Gmem, item: Item, head: Array, row: Array):
        self._op, self._head, self.item = op, head, item
        self._own: list[Array] = []
        self._token_names = [param.name for param in op.variant.token_params]
        self._row = row
        self._kept: dict[str, list[Array]] = {}
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

        self._keep()

    def score(self, scores: Array, position: Array, key: Array, numbers: list[Array]) -> Logits:
        """Of queries from ``position`` on and keys from ``key`` on. ``numbers``: the keys'
        per_token params."""
        score_mod = self._op.variant.score_mod
        if score_mod is None:
            return Logits(scores, self._op.scale * LOG2E, None)
        forms, raw = self._forms("score_mod"), Tile(scores, np.float32(self._op.scale))

        def modified(scores: Array, tables: dict[str, Value]) -> Value:
            pair = self._pair(forms, position, key, numbers, tables)
            return forms.evaluate(score_mod, replace(raw, pairs=scores), *pair)

        if not self._tables:
            return _logits(forms, modified(scores, {}))

        def near(scores: Array) -> Array:
            return forms.tile(modified(scores, self._at(position, key)))

        def far(scores: Array) -> Array:
            numbers = {name: ref[self._head, 0, 0, 0] for name, (ref, _) in self._tables.items()}
            return forms.tile(modified(scores, {n: Apart(x) for n, x in numbers.items()}))

        # Behind the longest table each is one number.
        distance = self._first(position) - (key + self._op.config.block_kv - 1)
        is_far = distance >= max(size for _, size in self._tables.values()) - 1
        return Logits(lax.cond(is_far, far, near, scores), LOG2E, None)

    def seen(
        self, shape: tuple[int, ...], position: Array, key: Array, numbers: list[Array]
    ) -> Array:
        """What the variant's mask lets be seen."""
        forms = self._forms("mask_mod")
        mask_mod: Any = self._op.variant.mask_mod
        pair = self._pair(forms, position, key, numbers, self._at(position, key))
        return forms.tile(forms.evaluate(mask_mod, *pair))

    def _forms(self, function: str) -> Forms:
        return Forms((ROWS, self._op.config.block_kv), self._kept.get(function))

    def _keep(self) -> None:
        """What functions compute alike for all blocks. Others than these read no tables and no
        numbers of tokens, which there are only in a block."""
        variant, zero = self._op.variant, jnp.int32(0)
        if self._tables or self._token_names:
            return
        for name in ("score_mod", "mask_mod"):
            if getattr(variant, name) is None:
                continue

            def kept(scalars: dict[str, Any], head: Array, name: str = name) -> list[Array]:
                forms = self._forms(name)
                params = SimpleNamespace(**jax.tree.map(Apart, scalars))
                given = [*self._positions(forms, zero, zero), Apart(head), params]
                if name == "score_mod":
                    zeros = jnp.zeros(forms.shape, jnp.float32)
                    given.insert(0, Tile(zeros, np.float32(1)))
                forms.evaluate(getattr(variant, name), *given)
                return forms.kept

            closed = jax.make_jaxpr(kept)(self._scalars, self._head)
            jaxpr, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
            flat = jax.tree.leaves((self._scalars, self._head))
            asked = [value for value, is_used in zip(flat, used, strict=True) if is_used]
            held = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
            consts = [held[constant] for constant in jaxpr.constvars]
            self._kept[name] = eval_jaxpr(jaxpr, consts, *asked)

    def _pair(
        self,
        forms: Forms,
        position: Array,
        key: Array,
        numbers: list[Array],
        tables: dict[str, Value],
    ) -> tuple[Any, ...]:
        """What functions get beside a score, in parts."""
        params = SimpleNamespace(**jax.tree.map(Apart, self._scalars), **tables)
        for name, own, keys in zip(self._token_names, self._own, numbers, strict=True):
            setattr(params, name, OfPair(Apart(queries=own), Apart(keys=keys)))
        return *self._positions(forms, position, key), Apart(self._head), params

    def _positions(self, forms: Forms, position: Array, key: Array) -> tuple[Positions, Positions]:
        def index(size: int, axis: int) -> Array:
            # Mosaic finds no layout for an iota alone.
            zeros = plgpu.layout_cast(jnp.zeros(size, jnp.int32), WGMMA.reduce(1 - axis))
            return lax.iota(jnp.int32, size) + zeros

        query = Positions(lambda: Apart(position, index(forms.shape[0], 0)))
        token = Positions(lambda: Apart(key, None, index(forms.shape[1], 1), is_still=True))
        return query, token

    def seen_whole(self, position: Array, key: Array) -> Array | None:
        """Whether the variant's mask surely hides nothing of a block from the tile's own rows; None
        if that can never be said."""
        unknown = {
            param.name: jax.ShapeDtypeStruct((), jnp.dtype(param.dtype))
            for param in self._op.variant.params
        }
        pairs = {name: OfPair(unknown[name], unknown[name]) for name in self._token_names}
        params = SimpleNamespace(**(unknown | pairs | self._scalars))
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

    def _at(self, position: Array, key: Array) -> dict[str, Value]:
        tiles: dict[str, Value] = {}
        block = self._op.config.block_kv
        for name, (ref, size) in self._tables.items():
            start = slice_start(position, key, size, edge_of(block), ROWS) - ROWS
            odd = lax.rem(start, jnp.int32(2))
            rectangle = ref.at[self._head, odd, :, pl.ds(start - odd, block)]
            tiles[name] = Tile(plgpu.load(rectangle, layout=WGMMA, optimized=False))
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
