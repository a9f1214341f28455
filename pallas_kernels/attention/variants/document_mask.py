"""Several documents in one prompt that do not see each other: a request names where the second,
third and so on begin. Places that are not used stay at the largest int32.
"""

from functools import reduce
from types import SimpleNamespace

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param

MAX_STARTS = 8
UNUSED = 2**31 - 1


def _same_document(q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    """No document begins after the key and up to the query."""
    apart = [(start <= kv_pos) | (start > q_pos) for start in params.starts]
    return reduce(jnp.logical_and, apart)


def _documents(q_first: Array, q_last: Array, params: SimpleNamespace) -> tuple[Array, Array]:
    starts = jnp.stack(params.starts)
    return jnp.max(jnp.where(starts <= q_first, starts, 0)), q_last


DOCUMENT_MASK = AttentionVariant(
    "document_mask",
    mask_mod=_same_document,
    kv_range=_documents,
    params=(Param("starts", "per_row", default=UNUSED, size=MAX_STARTS, dtype="int32"),),
)
