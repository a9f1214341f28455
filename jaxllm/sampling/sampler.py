"""The ``sample`` half of a step: logits of R rows to one token each, by the mode of the step.

No mode holds a branch of its own. What few rows ask for is done for all of them: it costs a few
reads of the logits, less than a GPU would wait for a condition, and a row that did not ask keeps
its bits.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.sampling.logprobs import token_logprobs
from jaxllm.sampling.metadata import SamplerOutput, SamplingMetadata
from jaxllm.sampling.processors import (
    apply_logit_bias,
    apply_penalties,
    apply_token_mask,
    ban_stop_tokens,
)
from pallas_kernels.sampling.api import sample
from pallas_kernels.sampling.xla import first_largest


def greedy_tokens(logits: Float[Array, "R V"], *, platform: str) -> SamplerOutput:
    """What ``random_tokens`` gives where every temperature is 0."""
    # XLA's argmax is one pass on a GPU, and slow on a CPU.
    tokens = first_largest(logits) if platform == "cpu" else jnp.argmax(logits, axis=-1)
    return SamplerOutput(tokens.astype(jnp.int32), _all_finite(logits), None)


def random_tokens(
    logits: Float[Array, "R V"], md: SamplingMetadata, *, platform: str
) -> SamplerOutput:
    """Temperature, min-p, top-k, top-p and the draw; ``platform`` as in pallas_kernels' sample."""
    return SamplerOutput(_draw(logits, md, platform), _all_finite(logits), None)


def full_tokens(
    logits: Float[Array, "R V"],
    md: SamplingMetadata,
    output_counts: Int[Array, "R V"],
    prompt_seen: Bool[Array, "R V"],
    mask: Int[Array, "R W"],
    *,
    platform: str,
) -> SamplerOutput:
    """Mask, bias, minimum length, penalties, then as ``random_tokens``; and log-probabilities."""
    x = apply_token_mask(logits, mask)
    x = apply_logit_bias(x, md)
    x = ban_stop_tokens(x, md)
    x = apply_penalties(x, md, output_counts, prompt_seen)
    tokens = _draw(x, md, platform)
    # Parameters that forbid every token leave -inf as the best.
    finite = _all_finite(logits) & (x.max(axis=-1) > -jnp.inf)
    return SamplerOutput(tokens, finite, token_logprobs(logits, tokens))


def _draw(x: Float[Array, "R V"], md: SamplingMetadata, platform: str) -> Int[Array, " R"]:
    parameters = (md.temperature, md.top_k, md.top_p, md.min_p)
    return sample(x, *parameters, md.seed, md.position, platform=platform)


def _all_finite(logits: Float[Array, "R V"]) -> Bool[Array, " R"]:
    return jnp.isfinite(logits).all(axis=-1)
