"""Where the answers of a consumer of the prefill kernel go."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.prefill_sm90_items import (
    Gmem,
    Item,
    PrefillOp,
    Shared,
    rows_and_head,
)
from pallas_kernels.attention.prefill_tiles import ROWS


def store(
    gmem: Gmem, smem: Shared, op: PrefillOp, item: Item, consumer: Array, result: Array
) -> None:
    """Writes the tile's own rows and no other: their neighbours belong to other thread blocks."""
    (row, head), dim = rows_and_head(item, consumer, op.config), smem.q.shape[2]
    low = lax.clamp(jnp.int32(0), item.low - row, jnp.int32(ROWS))
    high = lax.clamp(jnp.int32(0), item.high - row, jnp.int32(ROWS))
    tokens = _Tokens(high - low == ROWS, low, high, item.token + row)
    narrow, columns = result.astype(smem.o_rows.dtype), smem.o_rows.shape[2]
    for column in range(0, dim, columns):
        plgpu.wait_smem_to_gmem(0)  # of the columns before, or the item before
        part = narrow if columns == dim else narrow[:, column : column + columns]
        where = (head,) if columns == dim else (head, pl.ds(column, columns))
        _store_columns(gmem, smem, consumer, part, tokens, where)


class _Tokens(NamedTuple):
    """Which of a consumer's rows are the tile's own, and the token of the first row."""

    whole: Array  # all are
    low: Array
    high: Array
    first: Array


def _store_columns(
    gmem: Gmem,
    smem: Shared,
    consumer: Array,
    narrow: Array,
    tokens: _Tokens,
    where: tuple[Any, ...],
) -> None:
    """``where``: the head, and its columns unless it is all of them."""
    whole, low, high, token = tokens

    def store_whole() -> None:
        smem.o.at[consumer][...] = narrow
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.o.at[consumer], gmem.out.at[pl.ds(token, ROWS), *where])

    def store_rows(size: int) -> None:
        smem.o_rows.at[consumer][...] = narrow
        plgpu.commit_smem()
        start = low
        while size:  # a transfer's size is static: one per binary digit of the number of rows
            digit = (high - low) & size

            @pl.when(digit != 0)
            def _(start: Array = start, size: int = size) -> None:
                source = smem.o_rows.at[consumer, pl.ds(start, size)]
                target = gmem.out.at[pl.ds(token + start, size), *where]
                plgpu.copy_smem_to_gmem(source, target)

            start, size = start + digit, size // 2

    if smem.o is None:
        store_rows(ROWS)
    else:
        pl.when(whole)(store_whole)
        pl.when(jnp.logical_not(whole))(lambda: store_rows(ROWS // 2))
