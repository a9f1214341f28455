"""What the warpgroups of prefill over latents share: names of their memory, and their work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.attention.dealt import Dealt
from pallas_kernels.attention.prefill_sm90_items import ceil_div
from pallas_kernels.attention.prefill_tiles import ALIGN

BLOCK = 64  # keys per step
STAGES = 2


@dataclass(frozen=True)
class LatentOp:
    """Everything static beside the shapes."""

    scale: float
    heads: int
    num_ctas: int
    interpret: bool = False


class Gmem(NamedTuple):
    q: Any  # [T * H, D]: a row is one head of one token
    kv: Any  # [P, 1, 1, B, D]
    block_tables: Any
    table: Any  # PrefillTiles, of rows
    count: Any
    out: Any  # [T * H, V]


class Part(NamedTuple):
    """Channels of queries and keys: each half of the values, and the rest."""

    q: Any  # [ROWS, C]
    k: Any  # [STAGES, BLOCK, C]
    k_full: Any  # [STAGES]
    k_free: Any  # [STAGES]; last read by who sums this half, or of the rest by who scores
    channels: slice


class Shared(NamedTuple):
    """Shared memory of a thread block, then its barriers. Each part of the keys comes and goes by
    itself, so that scores are begun when the first has come."""

    q: Any  # [2, ROWS, V / 2]; in the end the answers, on their way to memory
    k0: Any  # [STAGES, BLOCK, V / 2]
    k1: Any
    p: Any  # [ROWS, BLOCK] weights of a block
    decay: Any  # [ROWS] by which sums shrink before it is added; in the end one over the total
    q_full: Any
    q_free: Any
    k0_full: Any
    k0_free: Any
    k1_full: Any
    k1_free: Any
    k_raw: Any  # parts of a block that still hold what lies past its row's end
    p_full: Any  # weights and decay
    p_free: Any
    q_rest: Any = None  # [ROWS, D - V], unless that is nothing
    k_rest: Any = None  # [STAGES, BLOCK, D - V]
    rest_full: Any = None
    rest_free: Any = None

    def rest(self) -> list[Part]:
        if self.q_rest is None:
            return []
        first, width = 2 * self.q.shape[2], self.q_rest.shape[1]
        channels = slice(first, first + width)
        return [Part(self.q_rest, self.k_rest, self.rest_full, self.rest_free, channels)]

    def halves(self) -> list[Part]:
        width = self.q.shape[2]
        return [
            Part(self.q.at[0], self.k0, self.k0_full, self.k0_free, slice(0, width)),
            Part(self.q.at[1], self.k1, self.k1_full, self.k1_free, slice(width, 2 * width)),
        ]


class Item(NamedTuple):
    """Scalars of one tile, which every warpgroup reads for itself."""

    slot: Array
    row: Array  # first of the window
    position: Array  # of it among the rows of its sequence: token position * H + head
    low: Array  # window rows of the tile: low <= i < high
    high: Array
    length: Array  # tokens of the sequence
    clear: Array  # blocks that every row sees whole, and all
    end: Array


def my_items(gmem: Gmem, op: LatentOp) -> tuple[Array, Callable[[Array], Item]]:
    """How many items this thread block has, and how to read the i-th."""
    dealt = Dealt(gmem.count[0], op.num_ctas)

    def read(turn: Array) -> Item:
        tile, heads = dealt(turn), jnp.int32(op.heads)
        slot, group, position, low, high, length = (gmem.table[tile, i] for i in range(6))
        length = lax.div(length, heads)
        first = lax.div(lax.max(position + low, jnp.int32(0)), heads)  # token
        end = ceil_div(lax.min(ceil_div(position + high, op.heads), length), BLOCK)
        clear = lax.min(lax.div(first + 1, jnp.int32(BLOCK)), end)
        return Item(slot, group * ALIGN, position, low, high, length, clear, end)

    return dealt.count, read
