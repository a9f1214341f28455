"""Each query sees itself and the ``window - 1`` tokens before it (Longformer, arXiv:2004.05150).

The window of a model's own config is not this but an argument of the kernels, which then skip the
mask too where a block is seen whole. This one can differ by layer at run time.
"""

from types import SimpleNamespace

from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param


def _near(q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    return q_pos - kv_pos < params.window


def _span(q_first: Array, q_last: Array, params: SimpleNamespace) -> tuple[Array, Array]:
    return q_first - params.window + 1, q_last


SLIDING_WINDOW = AttentionVariant(
    "sliding_window",
    mask_mod=_near,
    kv_range=_span,
    params=(Param("window", "per_layer", default=4096, dtype="int32"),),
)
