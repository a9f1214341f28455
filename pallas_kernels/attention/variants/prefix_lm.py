"""The first ``prefix_len`` tokens of a request see each other in both directions, the rest is
causal (T5's prefix LM, arXiv:1910.10683).
"""

from types import SimpleNamespace

from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param


def _seen(q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    return (kv_pos <= q_pos) | (kv_pos < params.prefix_len)


PREFIX_LM = AttentionVariant(
    "prefix_lm",
    mask_mod=_seen,
    lookahead="prefix_len",
    params=(Param("prefix_len", "per_row", default=0, dtype="int32"),),
)
