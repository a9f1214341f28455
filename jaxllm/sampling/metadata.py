"""Per-slot sampling parameters inside a step. R batch slots, V vocabulary."""

from dataclasses import dataclass
from enum import StrEnum

import jax
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingMetadata:
    temperature: Float[Array, " R"]  # 0: greedy
    top_k: Int[Array, " R"]  # 0: off
    top_p: Float[Array, " R"]  # 1: off
    min_p: Float[Array, " R"]  # 0: off
    presence_penalty: Float[Array, " R"]
    frequency_penalty: Float[Array, " R"]
    repetition_penalty: Float[Array, " R"]
    seed: Int[Array, "R 2"]  # the two words of a threefry key
    position: Int[Array, " R"]  # of the token to be sampled = tokens so far; the RNG's counter
    stop_ban_end: Int[
        Array, " R"
    ]  # stop tokens are banned while position < stop_ban_end (min_tokens)
    num_stop_ids: Int[Array, " R"]
    stop_ids: Int[Array, "R S"]
    num_bias: Int[Array, " R"]
    bias_ids: Int[Array, "R N"]
    bias_values: Float[Array, "R N"]


class SamplerMode(StrEnum):
    """Static: one program each, named by what its rows may ask for at most. A branch at run time
    would make a GPU wait for the host to read its condition."""

    GREEDY = "greedy"  # the likeliest token
    RANDOM = "random"  # also temperature, top_k, top_p, min_p
    FULL = "full"  # also penalties, biases, bans, masks, log-probabilities


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Raw log-probabilities at N positions."""

    token: Float[Array, " N"]
    rank: Int[Array, " N"]  # 1 is the most likely
    top_ids: Int[Array, "N L"]  # L = MAX_LOGPROBS, or V where that is less
    top: Float[Array, "N L"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerOutput:
    token_ids: Int[Array, " R"]
    # False: the row's logits held NaN or Inf, or no token was allowed; its token means nothing.
    finite: Bool[Array, " R"]
    logprobs: Logprobs | None  # of a FULL step
