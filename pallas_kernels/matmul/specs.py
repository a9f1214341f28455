"""Shapes of skinny products that tests, benchmarks and tuning share."""

from typing import NamedTuple


class SkinnySpec(NamedTuple):
    name: str
    n: int
    k: int
    gated: bool = False
    wide: bool = False  # float32 results


# Llama 3.1 8B.
SPEED = (
    SkinnySpec("gate_up", 28672, 4096),
    SkinnySpec("gated", 28672, 4096, gated=True),
    SkinnySpec("down", 4096, 14336),
    SkinnySpec("qkv", 6144, 4096),
    SkinnySpec("o", 4096, 4096),
    SkinnySpec("lm_head", 128256, 4096, wide=True),
)
ROWS = (1, 2, 8, 9, 64)

# Few enough weights for a CPU.
SMALL = (
    SkinnySpec("one", 128, 512),
    SkinnySpec("ends_early", 192, 256),
    SkinnySpec("gated", 512, 256, gated=True),
    SkinnySpec("wide", 128, 256, wide=True),
)
