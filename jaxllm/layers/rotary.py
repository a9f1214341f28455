"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with the scalings checkpoints
use.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config.model import RopeConfig
from pallas_kernels.kv_write.xla import rotate


class RotaryTable(NamedTuple):
    """Angles of one step's tokens, computed once and shared by all layers."""

    cos: Float[Array, "T F"]  # float32; F = rotated channels / 2
    sin: Float[Array, "T F"]


def inverse_frequencies(rope: RopeConfig) -> np.ndarray:
    """float32 ``[rope.dim / 2]``: radians per position of each channel pair."""
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / rope.dim
    inv_freq = (1.0 / rope.theta**exponent).astype(np.float32)
    if rope.scaling == "linear":
        return inv_freq / np.float32(rope.factor)
    if rope.scaling == "llama3":
        return _llama3(inv_freq, rope)
    if rope.scaling == "yarn":
        return _yarn(inv_freq, rope)
    return inv_freq


def _llama3(inv_freq: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Long wavelengths are slowed by ``factor``, short ones kept, those between interpolated
    (Llama 3.1).
    """
    wavelength = 2 * math.pi / inv_freq
    turns = rope.original_max_position / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * inv_freq / rope.factor + blend * inv_freq).astype(np.float32)


def _yarn(inv_freq: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Channels that turn often within the original context are kept, those that turn seldom slowed
    by ``factor``, those between interpolated (arXiv:2309.00071).
    """

    def channel(turns: float) -> float:
        size = rope.original_max_position / (turns * 2 * math.pi)
        return rope.dim * math.log(size) / (2 * math.log(rope.theta))

    first = max(math.floor(channel(rope.beta_fast)), 0)
    last = min(math.ceil(channel(rope.beta_slow)), rope.dim - 1)
    pairs = np.arange(rope.dim // 2, dtype=np.float32)
    slowed = np.clip((pairs - first) / max(last - first, 0.001), 0, 1)
    return (slowed * inv_freq / rope.factor + (1 - slowed) * inv_freq).astype(np.float32)


def rotary_table(rope: RopeConfig, positions: Int[Array, " T"]) -> RotaryTable:
    inv_freq = jnp.asarray(inverse_frequencies(rope))
    angles = positions.astype(jnp.float32)[:, None] * inv_freq[None, :]
    return RotaryTable(rope.amplitude * jnp.cos(angles), rope.amplitude * jnp.sin(angles))


def apply_rotary(
    x: Float[Array, "T H D"], table: RotaryTable, rope: RopeConfig
) -> Float[Array, "T H D"]:
    """The first ``rope.dim`` channels of every head turned; the rest passes through.

    For a layer that makes its own queries and keys; one that hands over its fused projection
    (HeadTransform) has them turned by the attention backend.
    """
    return rotate(x, *table, interleaved=rope.interleaved)
