"""What the sampling kernels can be told: tile counts, and the parameters of each row."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

VECTOR = 4  # float32 values one thread loads in one instruction
TILE = 128 * VECTOR  # columns that a thread block loads at once
KEPT = 4  # values kept per group
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """``splits`` thread blocks share a row, each with ``unroll`` tile loads in flight."""

    splits: int = 8
    unroll: int = 4

    def __post_init__(self) -> None:
        if self.splits < 4 or self.splits % 2:  # select pairs them, and pairs must be several
            raise ValueError(f"splits must be even and at least 4, not {self.splits}")
        if self.unroll < 1:
            raise ValueError(f"unroll must be positive, not {self.unroll}")

    def chunk(self, vocab: int) -> int:
        """Columns of one split: whole blocks of ``unroll`` tiles; depends on the vocabulary only,
        so that a row's bits do not depend on the batch."""
        block = self.unroll * TILE
        return -(-vocab // (self.splits * block)) * block

    def columns(self, vocab: int, split: jax.Array) -> jax.Array:
        """How many there really are in a split; the last ones may have fewer, or none."""
        chunk = self.chunk(vocab)
        return jnp.clip(vocab - split * chunk, 0, chunk)


class Truncation(NamedTuple):
    """Per-row parameters; see ``api.py``."""

    temperature: Float[Array, " R"]
    top_k: Int[Array, " R"]
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]
