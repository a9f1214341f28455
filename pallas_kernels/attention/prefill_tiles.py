"""The tile map of chunked prefill: which tokens a thread block attends, and in what order.

Pure XLA, run once per step and shared by all layers. Knows nothing of heads, pages or the kernel.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

ROWS = 64  # query rows of one consumer warpgroup: the M of a wgmma instruction
ALIGN = 8  # a transfer into swizzled shared memory starts at a multiple of 8 tokens
_CONSUMERS = 2


@dataclass(frozen=True)
class PrefillConfig:
    """Tile sizes of the kernel. Changing ``block_kv`` may change the last bits of results."""

    heads_per_tile: int = 2  # 2: both warpgroups attend the same 64 tokens; 1: 128 tokens, one head
    block_kv: int = 128  # keys per pipeline step
    stages: int = 2  # K and V blocks in flight
    num_ctas: int = 132  # persistent thread blocks: the number of SMs
    take_turns: bool = True  # one warpgroup multiplies while the other takes exponentials
    consumer_registers: int = 232
    producer_registers: int = 40
    issuers: int = 1  # 1: all warps of the producer meet for every copy; 2, 4: warps deal them out

    def __post_init__(self) -> None:
        if self.heads_per_tile not in (1, 2):
            raise ValueError(f"heads_per_tile must be 1 or 2, not {self.heads_per_tile}")
        if self.block_kv % ROWS or not 0 < self.block_kv <= 256:
            raise ValueError(f"block_kv must be 64, 128, 192 or 256, not {self.block_kv}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, not {self.stages}")
        if self.num_ctas < 1:
            raise ValueError(f"num_ctas must be positive, not {self.num_ctas}")
        if self.issuers not in (1, 2, 4):
            raise ValueError(f"issuers must be 1, 2 or 4, not {self.issuers}")
        # A thread block of 384 threads starts with 168 registers each; asking for more than these
        # in all waits for ever.
        if _CONSUMERS * self.consumer_registers + self.producer_registers > 504:
            raise ValueError("two consumers and one producer share 504 registers per lane")

    @property
    def tokens(self) -> int:
        """Tokens per tile."""
        return ROWS * _CONSUMERS // self.heads_per_tile

    def smem_bytes(self, head_dim: int, *, widens: bool = False, numbers: int = 0) -> int:
        """Shared memory of a thread block, less what barriers take. ``widens``: pages have eight
        bits, which lie in two blocks of their own first. ``numbers``: per_token params."""
        whole = 2 * ROWS + (2 * self.stages + widens) * self.block_kv
        answers = (2 if widens else 4) * ROWS * columns_at_once(head_dim)
        return 2 * (whole * head_dim + answers) + 4 * self.stages * numbers * self.block_kv


def columns_at_once(head_dim: int) -> int:
    """Of an answer on its way to memory: wide heads leave room for a part of it."""
    return head_dim if head_dim <= 128 else 64


class PrefillTiles(NamedTuple):
    """Windows of ``config.tokens`` tokens, the most expensive first. N is a static bound.

    A window starts at a multiple of 8, so it may cover tokens of neighbouring rows; only its
    window rows ``low <= i < high`` belong to the tile. The fields of a tile are: batch slot,
    first token / 8, position of that token in its row (may be negative), low, high, seq_len.
    Padding forms tiles of seq_len 0, whose output is zero; decode tokens are in no tile.
    """

    table: Int[Array, "N F"]
    count: Int[Array, " 1"]  # tiles in use


def padded_tokens(num_tokens: int, config: PrefillConfig) -> int:
    """Tokens that q must have for every window to fit inside it."""
    return max(-(-num_tokens // ALIGN) * ALIGN, config.tokens)


def make_prefill_tiles(
    query_start_loc: Int[Array, " R1"],
    seq_lens: Int[Array, " R"],
    num_decode_rows: Int[Array, ""],
    num_tokens: int,
    config: PrefillConfig,
) -> PrefillTiles:
    """Cuts the tokens of all slots from ``num_decode_rows`` on into tiles of one slot each."""
    starts, ends, lens = _segments(query_start_loc, seq_lens, num_decode_rows, num_tokens)
    width, rows = config.tokens, seq_lens.shape[0]
    aligned = starts // ALIGN * ALIGN
    tiles = jnp.where(ends > starts, (ends - aligned + width - 1) // width, 0)
    last = jnp.cumsum(tiles)
    bound = (num_tokens + (rows + 1) * (width + ALIGN - 2)) // width
    tile = jnp.arange(bound, dtype=jnp.int32)
    segment = jnp.searchsorted(last, tile, side="right", method="compare_all").astype(jnp.int32)
    segment = jnp.minimum(segment, rows)
    start = aligned[segment] + (tile - last[segment] + tiles[segment]) * width
    low = jnp.maximum(start, starts[segment])
    high = jnp.minimum(start + width, ends[segment])
    start = jnp.minimum(start, padded_tokens(num_tokens, config) - width)
    position = lens[segment] - ends[segment] + start
    used = tile < last[-1]
    keys = jnp.minimum(position + high - start, lens[segment])
    steps = (keys + config.block_kv - 1) // config.block_kv
    order = jnp.argsort(jnp.where(used, -steps, 1), stable=True)
    zero = jnp.zeros_like(tile)
    slot = jnp.minimum(segment, rows - 1)
    fields = (slot, start // ALIGN, position, low - start, high - start, lens[segment], zero, zero)
    return PrefillTiles(jnp.stack(fields, axis=1)[order], last[-1:].astype(jnp.int32))


def _segments(
    query_start_loc: Int[Array, " R1"],
    seq_lens: Int[Array, " R"],
    num_decode_rows: Int[Array, ""],
    num_tokens: int,
) -> tuple[Int[Array, " S"], Int[Array, " S"], Int[Array, " S"]]:
    """Start, end and seq_len of every slot (nothing if it decodes), and of the padding at the
    end."""
    prefills = jnp.arange(seq_lens.shape[0]) >= num_decode_rows
    begin, end = query_start_loc[:-1], query_start_loc[1:]
    starts = query_start_loc  # the padding starts where the last row ends
    ends = jnp.append(jnp.where(prefills, end, begin), num_tokens)
    return starts, ends, jnp.append(seq_lens, 0)
