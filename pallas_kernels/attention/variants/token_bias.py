"""A bias for every token of a prompt, which a request brings as a list: to stress or to fade single
tokens, as ``request_bias`` does one span.
"""

from types import SimpleNamespace

from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param


def _add(score: Array, q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    return score + params.token_bias.key


TOKEN_BIAS = AttentionVariant(
    "token_bias", score_mod=_add, params=(Param("token_bias", "per_token"),)
)
