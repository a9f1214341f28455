"""Shapes of the KV write that tests, benchmarks and tuning share."""

from typing import NamedTuple

from pallas_kernels.head_dims import padded_dim
from pallas_kernels.kv_write.narrow import FP8


class KVWriteSpec(NamedTuple):
    heads: int
    kv_heads: int
    dim: int
    page: int
    qk_norm: bool
    pages: str | None = None  # dtype of the cache; None: that of the projection

    @property
    def stored(self) -> int:
        """Channels of a head in the cache."""
        return padded_dim(self.dim)


SPECS = (
    KVWriteSpec(32, 8, 128, 64, False),  # Llama 3.1 8B
    KVWriteSpec(64, 8, 128, 64, False),  # Llama 3.1 70B
    KVWriteSpec(8, 1, 128, 64, False),  # the same on eight devices
    KVWriteSpec(16, 8, 128, 16, True),  # Qwen3 0.6B
    KVWriteSpec(28, 4, 128, 64, False),  # Qwen2.5 7B
    KVWriteSpec(14, 2, 64, 32, False),  # Qwen2.5 0.5B
    KVWriteSpec(9, 3, 64, 16, False),  # SmolLM2 135M
    KVWriteSpec(8, 4, 256, 64, True),  # Gemma-like
    KVWriteSpec(32, 8, 128, 64, False, FP8),  # Llama 3.1 8B
    KVWriteSpec(9, 3, 64, 16, True, FP8),
    KVWriteSpec(32, 8, 80, 64, False),  # Danube
    KVWriteSpec(32, 32, 96, 16, False),  # Phi 3 mini
    KVWriteSpec(9, 1, 80, 32, False),
    KVWriteSpec(9, 1, 80, 32, False, FP8),
)


class KVWriteBatch(NamedTuple):
    spec: KVWriteSpec
    tokens: int


# Speed: Llama 3.1 8B, from a decode step to a prefill step.
SPEED = tuple(KVWriteBatch(SPECS[0], tokens) for tokens in (1, 8, 64, 256, 2048, 8192))
SPEED += tuple(KVWriteBatch(SPECS[8], tokens) for tokens in (64, 8192))

# Speed of padded heads.
SPEED_OTHERS = tuple(KVWriteBatch(SPECS[10], tokens) for tokens in (8, 64, 2048))

# Few enough tokens for a CPU.
SMALL = tuple(KVWriteBatch(spec, 4) for spec in SPECS)
