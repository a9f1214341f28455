"""The ``sample`` half of a step: logits of R rows to one token each."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.sampling.logprobs import no_logprobs, token_logprobs
from jaxllm.sampling.metadata import SamplerOutput, SamplingFlags, SamplingMetadata
from jaxllm.sampling.processors import (
    apply_logit_bias,
    apply_penalties,
    apply_token_mask,
    ban_stop_tokens,
)
from jaxllm.sampling.rng import gumbel_noise
from jaxllm.sampling.truncation import NEG_INF, truncate


def greedy_tokens(logits: Float[Array, "R V"]) -> SamplerOutput:
    """What ``sample_tokens`` gives when no row asks for anything, without a branch."""
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return SamplerOutput(tokens, jnp.isfinite(logits).all(axis=-1), no_logprobs(*logits.shape))


def sample_tokens(
    logits: Float[Array, "R V"],
    md: SamplingMetadata,
    flags: SamplingFlags,
    output_counts: Int[Array, "R V"],
    prompt_seen: Bool[Array, "R V"],
    mask: Int[Array, "R W"],
) -> SamplerOutput:
    """Mask, bias, minimum length, penalties, temperature, min-p, top-k, top-p, draw; in that
    order.
    """
    x = lax.cond(flags.masked, lambda y: apply_token_mask(y, mask), _same, logits)
    x = lax.cond(flags.bias, lambda y: apply_logit_bias(y, md), _same, x)
    x = lax.cond(flags.stop_ban, lambda y: ban_stop_tokens(y, md), _same, x)
    x = lax.cond(
        flags.penalties, lambda y: apply_penalties(y, md, output_counts, prompt_seen), _same, x
    )
    greedy = jnp.argmax(x, axis=-1).astype(jnp.int32)
    tokens = lax.cond(flags.random, lambda y: _draw(y, md, flags, greedy), lambda _: greedy, x)
    scored = lax.cond(
        flags.logprobs,
        lambda y: token_logprobs(y, tokens),
        lambda y: no_logprobs(*y.shape),
        logits,
    )
    # Parameters that forbid every token leave -inf as the best; its argmax would be token 0.
    finite = jnp.isfinite(logits).all(axis=-1) & (x.max(axis=-1) > NEG_INF)
    return SamplerOutput(tokens, finite, scored)


def _draw(
    x: Float[Array, "R V"],
    md: SamplingMetadata,
    flags: SamplingFlags,
    greedy: Int[Array, " R"],
) -> Int[Array, " R"]:
    is_greedy = md.temperature == 0.0
    x = x / jnp.where(is_greedy, 1.0, md.temperature)[:, None]
    x = lax.cond(flags.truncate, lambda y: truncate(y, md), _same, x)
    noise = gumbel_noise(md.seed, md.position, x.shape[1])
    return jnp.where(is_greedy, greedy, jnp.argmax(x + noise, axis=-1).astype(jnp.int32))


def _same(x: Float[Array, "R V"]) -> Float[Array, "R V"]:
    return x
