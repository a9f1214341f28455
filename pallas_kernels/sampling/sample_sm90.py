"""Truncated sampling of whole vocabularies for Hopper (sm_90a), in Pallas Mosaic GPU.

Three launches, and nothing between them that the host would have to read: ``scan`` reads the logits
once and keeps the four largest of every group of columns, ``select`` finds each row's threshold,
nearly always among those few thousand values, and ``draw`` makes noise for the tokens above it.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sampling.draw_sm90 import draw_sm90
from pallas_kernels.sampling.noise import row_keys
from pallas_kernels.sampling.sample_config import TILE, VECTOR, SampleConfig, Truncation
from pallas_kernels.sampling.scan_sm90 import scan_sm90
from pallas_kernels.sampling.select_sm90 import select_sm90


def refuses_sample_sm90(vocab: int, platform: str) -> str | None:
    """None if the kernels take the shape, else the reason."""
    if platform != "sm_90":
        return f"the sampling kernels are built for sm_90, not {platform}"
    if vocab % VECTOR or vocab < TILE:
        return f"the sampling kernels take a multiple of {VECTOR} >= {TILE} columns, not {vocab}"
    return None


def sample_sm90(
    logits: Float[Array, "R V"],
    truncation: Truncation,
    seed: Int[Array, "R 2"],
    position: Int[Array, " R"],
    *,
    config: SampleConfig | None = None,
    interpret: Any = False,
) -> Int[Array, " R"]:
    """One token per row; see ``api.py``."""
    config = config or SampleConfig()
    greedy = truncation.temperature == 0
    # A greedy row keeps its largest value only, and gets no noise.
    truncation = Truncation(
        jnp.where(greedy, 1.0, truncation.temperature),
        jnp.where(greedy, 1, truncation.top_k),
        jnp.where(greedy, 1.0, truncation.top_p),
        jnp.where(greedy, 0.0, truncation.min_p),
    )
    threshold = thresholds_sm90(logits, truncation, config=config, interpret=interpret)
    noisy = jnp.where(greedy, 0, 1).astype(jnp.int32)
    keys, scale = row_keys(seed, position), truncation.temperature
    return draw_sm90(logits, scale, threshold, noisy, keys, config=config, interpret=interpret)


def thresholds_sm90(
    logits: Float[Array, "R V"],
    truncation: Truncation,
    *,
    config: SampleConfig,
    interpret: Any = False,
) -> Float[Array, " R"]:
    """A number that each row's kept logits reach, and no other. Temperatures must not be zero."""
    vocab = logits.shape[1]
    top_k = jnp.where((truncation.top_k > 0) & (truncation.top_k < vocab), truncation.top_k, 0)
    truncation = truncation._replace(top_k=top_k)
    # A row that keeps everything, the commonest of all, is not read for that.
    searched = (top_k > 0) | (truncation.top_p < 1.0) | (truncation.min_p > 0.0)
    scale = truncation.temperature
    tops, sums = scan_sm90(
        logits, scale, searched.astype(jnp.int32), config=config, interpret=interpret
    )
    return select_sm90(logits, tops, sums, truncation, config=config, interpret=interpret)
