"""A variant's params as arrays, in the forms that plain XLA and the kernels read."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.head_shares import own_value
from pallas_kernels.attention.variant import AttentionVariant, VariantError

Params = dict[str, Array]


class TokenValues(NamedTuple):
    """The N per_token params of a variant, float32, in order of declaration."""

    pages: Float[Array, "P N K B"]  # of all tokens, by the same block tables as their keys
    queries: Float[Array, "T N K"]  # of those that attend


class OfPair(NamedTuple):
    """A per_token param as functions get it; both broadcast with the scores. Arrays, or what
    stands for them where a function is computed in parts."""

    query: Any
    key: Any


def query_values(
    pages: Float[Array, "P N K B"],
    block_tables: Int[Array, "R M"],
    rows: Int[Array, " T"],
    positions: Int[Array, " T"],
) -> Float[Array, "T N K"]:
    """What pages hold of tokens at ``positions`` of ``rows``; anything for position -1."""
    position, size = jnp.maximum(positions, 0), pages.shape[3]
    return pages[block_tables[rows, position // size], :, :, position % size]


def param_arrays(
    variant: AttentionVariant, num_heads: int, num_rows: int, brought: Mapping[str, Array] | None
) -> Params:
    """Every param but per_token ones as an array: per_head [H], per_layer [], per_row [R] or
    [R, size], per_distance [H, size]. ``brought`` holds what rows brought, the defaults fill in."""
    arrays: Params = {}
    for param in variant.array_params:
        value = own_value(param, num_heads, variant.head_axis)
        if param.kind == "per_row":
            value = jnp.broadcast_to(value, (num_rows, *value.shape))
            if brought is not None and param.name in brought:
                given = brought[param.name]
                if given.shape != value.shape or given.dtype != value.dtype:
                    raise VariantError(
                        f"param {param.name}: takes {value.dtype}{list(value.shape)} here, not "
                        f"{given.dtype}{list(given.shape)}"
                    )
                value = given
        arrays[param.name] = value
    return arrays


def default_pairs(variant: AttentionVariant, num_heads: int) -> dict[str, OfPair]:
    """Every per_token param where all tokens have its default."""
    values = {p.name: jnp.float32(p.value(num_heads)) for p in variant.token_params}
    return {name: OfPair(value, value) for name, value in values.items()}


class KvSpan(NamedTuple):
    """Positions that some queries may see: ``begin <= position < end``; 0 and 0 for none."""

    begin: Int[Array, " N"]
    end: Int[Array, " N"]


def kv_spans(
    variant: AttentionVariant,
    arrays: Params,
    rows: Int[Array, " N"],
    q_first: Int[Array, " N"],
    q_last: Int[Array, " N"],
    written: Int[Array, " N"],
    window: int | None = None,
) -> KvSpan:
    """Of N groups of queries, each of one row. ``written``: tokens of the row in the cache."""
    begin = jnp.zeros_like(q_first) if window is None else q_first - (window - 1)
    end = written if variant.lookahead else jnp.minimum(q_last + 1, written)
    kv_range = variant.kv_range
    if kv_range is not None:
        per_row = {param.name for param in variant.row_params}
        sized = {param.name for param in variant.row_params if param.size is not None}
        shared = {name: value for name, value in arrays.items() if name not in per_row}
        mine = {name: arrays[name][rows] for name in per_row}

        def one(first: Array, last: Array, values: Params) -> tuple[Array, Array]:
            split = {name: tuple(v) if name in sized else v for name, v in values.items()}
            least, most = kv_range(first, last, SimpleNamespace(**shared, **split))
            return jnp.asarray(least, jnp.int32), jnp.asarray(most, jnp.int32)

        least, most = jax.vmap(one)(q_first, q_last, mine)
        begin, end = jnp.maximum(begin, least), jnp.minimum(end, most + 1)
    begin = jnp.maximum(begin, 0)
    return KvSpan(jnp.where(begin < end, begin, 0), jnp.where(begin < end, end, 0))


def head_columns(value: Array, kv_heads: int, padded: int) -> Array:
    """[H, ...] as [K, ..., padded]: heads of a KV head side by side, zeros after the last."""
    grouped = value.reshape(kv_heads, -1, *value.shape[1:])
    missing = padded - grouped.shape[1]
    grouped = jnp.pad(grouped, ((0, 0), (0, missing), *((0, 0),) * (value.ndim - 1)))
    return jnp.moveaxis(grouped, 1, -1)


def by_position(table: Array, tile: int) -> Array:
    """[H, size] by distance as [H, tile + size + tile] by position: what a tile of key positions
    needs is a slice, whose start ``slice_start`` gives."""
    edge = (*table.shape[:-1], tile)
    far, near = jnp.broadcast_to(table[:, -1:], edge), jnp.broadcast_to(table[:, :1], edge)
    return jnp.concatenate([far, table[:, ::-1], near], axis=1)


def slice_start(q_pos: Array, kv_pos: Array, size: int, tile: int, rows: int = 0) -> Array:
    """Where in ``by_position`` the keys from ``kv_pos`` on begin, for the query at ``q_pos``;
    within bounds even for the ``rows`` queries after it, whose keys begin one earlier each."""
    start = kv_pos - q_pos + (size - 1 + tile)
    return jax.lax.clamp(jnp.int32(rows), start, jnp.int32(size + tile + rows))


def spread(value: Array | bool, shape: tuple[int, ...]) -> Array:
    """What a function gave for a tile, as a tile."""
    value = jnp.asarray(value)
    return value if value.shape == shape else jax.lax.broadcast(value, shape)
