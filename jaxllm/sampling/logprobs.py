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
_GROUP = 64  # columns; of some 2,000 groups as many are looked into as alternatives are listed


def token_logprobs(logits: Float[Array, "N V"], token_ids: Int[Array, " N"]) -> Logprobs:
    """Scores ``token_ids``, one per row, and lists the most likely alternatives."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32)
    values, ids = largest(logits, min(MAX_LOGPROBS, logits.shape[1]))
    return Logprobs((chosen - total)[:, 0], rank, ids, values - total)


def largest(x: Float[Array, "N V"], count: int) -> tuple[Float[Array, "N L"], Int[Array, "N L"]]:
    """``lax.top_k``, ties included, without sorting whole rows: a group of columns that holds one
    of the ``count`` largest is among the ``count`` groups with the largest maxima. (Of equal
    maxima the first groups are taken, and they hold the first of equal values.)
    """
    rows, columns = x.shape
    if columns <= count * _GROUP:
        return lax.top_k(x, count)
    padded = jnp.pad(x, ((0, 0), (0, -columns % _GROUP)), constant_values=-jnp.inf)
    groups = padded.reshape(rows, -1, _GROUP)
    taken = jnp.sort(lax.top_k(groups.max(axis=-1), count)[1], axis=-1)
    candidates = jnp.take_along_axis(groups, taken[:, :, None], axis=1).reshape(rows, -1)
    values, place = lax.top_k(candidates, count)
    ids = jnp.take_along_axis(taken, place // _GROUP, axis=1) * _GROUP + place % _GROUP
    return values, ids


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
