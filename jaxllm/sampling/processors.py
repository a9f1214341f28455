"""Changes to logits before sampling, in a fixed order. Each is pure and leaves unasking rows' bits
alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.sampling.metadata import SamplingMetadata

_NEG_INF = float("-inf")


def apply_token_mask(logits: Float[Array, "R V"], mask: Int[Array, "R W"]) -> Float[Array, "R V"]:
    """Bit v of row r (word v // 32, least significant first) allows token v."""
    vocab = jnp.arange(logits.shape[1], dtype=jnp.int32)
    bits = (mask[:, vocab >> 5] >> (vocab & 31)[None]) & 1
    return jnp.where(bits == 1, logits, _NEG_INF)


def apply_logit_bias(logits: Float[Array, "R V"], md: SamplingMetadata) -> Float[Array, "R V"]:
    used = jnp.arange(md.bias_ids.shape[1])[None] < md.num_bias[:, None]
    ids = jnp.where(used, md.bias_ids, logits.shape[1])  # out of range: dropped
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, ids].add(md.bias_values, mode="drop")


def ban_stop_tokens(logits: Float[Array, "R V"], md: SamplingMetadata) -> Float[Array, "R V"]:
    """Until min_tokens are out, no stop token can be drawn."""
    banned = jnp.arange(md.stop_ids.shape[1])[None] < md.num_stop_ids[:, None]
    banned &= (md.position < md.stop_ban_end)[:, None]
    ids = jnp.where(banned, md.stop_ids, logits.shape[1])
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, ids].set(_NEG_INF, mode="drop")


def apply_penalties(
    logits: Float[Array, "R V"],
    md: SamplingMetadata,
    output_counts: Int[Array, "R V"],
    prompt_seen: Bool[Array, "R V"],
) -> Float[Array, "R V"]:
    """Repetition penalty (Keskar et al. 2019, arXiv:1909.05858) over prompt and output; OpenAI's
    frequency and presence penalties over the output."""
    counts = output_counts.astype(jnp.float32)
    in_output = counts > 0
    factor = md.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(in_output | prompt_seen, repeated, logits)
    logits = logits - md.frequency_penalty[:, None] * counts
    return logits - md.presence_penalty[:, None] * in_output.astype(jnp.float32)
