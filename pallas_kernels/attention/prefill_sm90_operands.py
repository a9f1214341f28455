"""What a variant's functions need in the prefill kernel, in the forms in which it reads them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.page_map import PageMap
from pallas_kernels.attention.prefill_sm90_items import PrefillOp
from pallas_kernels.attention.prefill_tiles import ROWS
from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_params import Params, TokenValues, by_position, kv_spans


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
    line = by_position(table, edge_of(block))
    width = (line.shape[1] - ROWS) // 2 * 2 + 2
    line = jnp.pad(line, ((0, 0), (0, 3)), mode="edge")
    starts = [[ROWS - row + odd for row in range(ROWS)] for odd in range(2)]
    shifts = [[line[:, start : start + width] for start in both] for both in starts]
    return jnp.stack([jnp.stack(rows, axis=1) for rows in shifts], axis=1)


def edge_of(block: int) -> int:
    """Of a table by distance, what tiles may reach beyond either end."""
    return block + ROWS


def _tile_spans(
    variant: AttentionVariant, arrays: Params, table: Int[Array, "N F"], op: PrefillOp
) -> Int[Array, "N 2"]:
    """Of whole tiles. ``lookahead`` alone makes a span of all that has been written."""
    slot, _, position, low, high, written, *_ = table.T
    first, last = position + low, position + high - 1
    return jnp.stack(kv_spans(variant, arrays, slot, first, last, written, op.window), axis=1)
