"""The query's own block of tokens, the block before it, and the first tokens of the row, which are
seen from everywhere (BigBird without its random blocks, arXiv:2007.14062).
"""

from types import SimpleNamespace

from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param


def _block_or_global(q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    local = kv_pos // params.block >= q_pos // params.block - 1
    return local | (kv_pos < params.num_global)


BLOCK_GLOBAL = AttentionVariant(
    "block_global",
    mask_mod=_block_or_global,
    params=(
        Param("block", "per_layer", default=512, dtype="int32"),
        Param("num_global", "per_layer", default=64, dtype="int32"),
    ),
)
