"""Tile sizes of the skinny matrix product, and what it cannot serve."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

MAX_ROWS = 64  # of x
TILE = 64  # weight rows of one wgmma
_SMEM_BYTES = 227 * 1024  # of one CTA on sm_90
_SM_BYTES = 228 * 1024  # of all CTAs of an SM, each with _CTA_BYTES of its own for the system
_CTA_BYTES = 1024
_RESERVED_BYTES = 3 * 1024  # barriers


@dataclass(frozen=True)
class SkinnyConfig:
    """Speed only, except ``splits``: it fixes the order of summation and so the bits of a row.

    Raises ValueError for sizes the kernel cannot run with.
    """

    consumers: int = 2  # warpgroups that multiply
    tiles: int = 1  # of 64 weight rows, of each consumer
    splits: int = 1  # of K, one CTA of a cluster each
    block_k: int = 128  # channels per pipeline stage
    ctas_per_sm: int = 1
    num_ctas: int = 132  # that walk the tiles where K is not split
    max_stages: int = 16
    prefetch: bool = (
        False  # loads weights while the kernel before still runs: it must not write them
    )

    def __post_init__(self) -> None:
        if self.consumers not in (1, 2, 3, 4) or self.tiles not in (1, 2, 3, 4):
            raise ValueError(f"1 to 4 consumers of 1 to 4 tiles, not {self}")
        if self.rows > 512:
            raise ValueError(f"a CTA takes at most 512 weight rows, not {self.rows}")
        if self.splits not in (1, 2, 4, 8):
            raise ValueError(f"splits must be 1, 2, 4 or 8, not {self.splits}")
        if self.block_k not in (64, 128, 256):
            raise ValueError(f"block_k must be 64, 128 or 256, not {self.block_k}")
        if self.num_ctas < 1 or self.ctas_per_sm < 1 or self.max_stages < 2:
            raise ValueError(f"sizes must be positive: {self}")

    @property
    def rows(self) -> int:
        """Weight rows of a CTA."""
        return TILE * self.consumers * self.tiles

    def owned(self, columns: int) -> int:
        """Of ``columns`` rows of x, those that one CTA of a cluster sums and writes."""
        return max(8, columns // self.splits)

    def stages(self, columns: int, out_bytes: int) -> int:
        """Blocks in flight per CTA with ``columns`` rows of x, whatever fits."""
        stage = (self.rows + columns) * self.block_k * 2
        owned = self.owned(columns)
        staging = self.consumers * TILE * owned * out_bytes
        received = self.rows * self.splits * owned * 4 if self.splits > 1 else 0
        room = min(_SM_BYTES // self.ctas_per_sm - _CTA_BYTES, _SMEM_BYTES)
        fitting = (room - _RESERVED_BYTES - staging - received) // stage
        return min(fitting, self.max_stages)


def padded_rows(rows: int) -> int:
    """Columns of a wgmma for ``rows`` of x: a power of two from 8 on, so that splits divide it."""
    return max(8, 1 << (rows - 1).bit_length())


def default_skinny_config(
    n: int, k: int, *, gated: bool = False, num_sms: int = 132
) -> SkinnyConfig:
    """A function of the weight alone, never of how many rows x has."""
    if gated:
        return SkinnyConfig(consumers=2, tiles=2, block_k=64, num_ctas=num_sms)
    if n // 256 >= num_sms // 2:
        return SkinnyConfig(consumers=4, block_k=64, num_ctas=num_sms)
    for splits in (1, 2, 4, 8):
        config = SkinnyConfig(splits=splits, num_ctas=num_sms)
        tiles = -(-n // config.rows)
        if tiles * splits * 3 >= num_sms * 2 and k % (splits * config.block_k) == 0:
            return config
    return SkinnyConfig(block_k=64, num_ctas=num_sms)


def refuses_skinny_sm90(
    rows: int,
    n: int,
    k: int,
    dtype: Any,
    out_dtype: Any,
    platform: str,
    config: SkinnyConfig,
    *,
    gated: bool = False,
) -> str | None:
    """None if the kernel multiplies ``[rows, k]`` with ``[n, k]``, else the reason."""
    kinds = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    if platform != "sm_90":
        return f"the skinny product is built for sm_90, not {platform}"
    if jnp.dtype(dtype) not in kinds:
        return f"the skinny product takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    if jnp.dtype(out_dtype) not in (jnp.dtype(dtype), jnp.dtype(jnp.float32)):
        return f"the skinny product returns {jnp.dtype(dtype)} or float32, not {out_dtype}"
    if not 1 <= rows <= MAX_ROWS:
        return f"the skinny product takes 1 to {MAX_ROWS} rows, not {rows}"
    if n % TILE:
        return f"the skinny product takes a multiple of {TILE} weight rows, not {n}"
    if k % (config.block_k * config.splits):
        return f"{k} channels do not divide into {config.splits} splits of {config.block_k}"
    if gated and (config.splits > 1 or config.tiles % 2 or n % config.rows):
        return f"{config} cannot pair the gate and up rows of {n}"
    if config.stages(padded_rows(rows), 4) < 2:
        return f"{config} needs more shared memory than a CTA has"
    return None
