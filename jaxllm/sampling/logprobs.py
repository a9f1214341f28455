"""Log-probabilities of raw logits (before penalties and temperature), with ranks and
alternatives.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.models.decoder import DecoderLM
from jaxllm.sampling.metadata import Logprobs
from jaxllm.sampling_params import MAX_LOGPROBS

PROMPT_CHUNK = 32  # positions whose logits exist at once while a prompt is scored


def token_logprobs(logits: Float[Array, "N V"], token_ids: Int[Array, " N"]) -> Logprobs:
    """Scores ``token_ids``, one per row, and lists the most likely alternatives."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32)
    values, ids = lax.top_k(logits, _num_top(logits.shape[1]))
    return Logprobs((chosen - total)[:, 0], rank, ids.astype(jnp.int32), values - total)


def no_logprobs(positions: int, vocab_size: int) -> Logprobs:
    """Zeros in the shapes of ``token_logprobs``."""
    width = _num_top(vocab_size)
    return Logprobs(
        jnp.zeros((positions,), jnp.float32),
        jnp.zeros((positions,), jnp.int32),
        jnp.zeros((positions, width), jnp.int32),
        jnp.zeros((positions, width), jnp.float32),
    )


def prompt_logprobs(
    model: DecoderLM, hidden: Float[Array, "T E"], targets: Int[Array, " T"]
) -> Logprobs:
    """Scores the token after each fed one. Logits exist for a few positions at a time, so memory
    does not grow with the prompt."""
    tokens = hidden.shape[0]
    padding = -tokens % PROMPT_CHUNK
    hidden, targets = jnp.pad(hidden, ((0, padding), (0, 0))), jnp.pad(targets, (0, padding))

    def score(part: tuple[Float[Array, "C E"], Int[Array, " C"]]) -> Logprobs:
        return token_logprobs(model.compute_logits(part[0]), part[1])

    parts = (hidden.reshape(-1, PROMPT_CHUNK, hidden.shape[1]), targets.reshape(-1, PROMPT_CHUNK))
    scored = lax.map(score, parts)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:tokens], scored)


def _num_top(vocab_size: int) -> int:
    return min(MAX_LOGPROBS, vocab_size)
