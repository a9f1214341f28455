"""Log-probabilities of raw logits (before penalties and temperature), with ranks and
alternatives.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.models.decoder import DecoderLM
from jaxllm.sampling.metadata import Logprobs
from jaxllm.sampling_params import MAX_LOGPROBS

_CHUNK = 32  # positions whose logits exist at once while a prompt is scored


def token_logprobs(logits: Float[Array, "N V"], token_ids: Int[Array, " N"]) -> Logprobs:
    """Scores ``token_ids``, one per row, and lists the most likely alternatives."""
    width = min(MAX_LOGPROBS, logits.shape[1])
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32)
    values, ids = lax.top_k(logits, width)
    pad = ((0, 0), (0, MAX_LOGPROBS - width))
    return Logprobs(
        (chosen - total)[:, 0],
        rank,
        jnp.pad(ids.astype(jnp.int32), pad),
        jnp.pad(values - total, pad, constant_values=-jnp.inf),
    )


def no_logprobs(positions: int) -> Logprobs:
    return Logprobs(
        jnp.zeros((positions,), jnp.float32),
        jnp.zeros((positions,), jnp.int32),
        jnp.zeros((positions, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((positions, MAX_LOGPROBS), jnp.float32),
    )


def prompt_logprobs(
    model: DecoderLM, hidden: Float[Array, "T E"], targets: Int[Array, " T"]
) -> Logprobs:
    """Scores the token after each fed one. Logits exist for a few positions at a time, so memory
    does not grow with the prompt."""
    tokens = hidden.shape[0]
    chunk = math.gcd(tokens, _CHUNK)

    def score(part: tuple[Float[Array, "C E"], Int[Array, " C"]]) -> Logprobs:
        return token_logprobs(model.compute_logits(part[0]), part[1])

    parts = (hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk))
    scored = lax.map(score, parts)
    return jax.tree.map(lambda leaf: leaf.reshape(tokens, *leaf.shape[2:]), scored)
