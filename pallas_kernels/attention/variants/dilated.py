"""Every ``stride``-th token back from the query (Sparse Transformer, arXiv:1904.10509)."""

from types import SimpleNamespace

from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param


def _strided(q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    return (q_pos - kv_pos) % params.stride == 0


DILATED = AttentionVariant(
    "dilated",
    mask_mod=_strided,
    params=(Param("stride", "per_layer", default=2, dtype="int32"),),
)
