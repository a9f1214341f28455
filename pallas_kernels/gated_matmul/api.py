"""The gated product: the kernel where it takes the shape, plain XLA elsewhere."""

from jaxtyping import Array, Float

from pallas_kernels.gated_matmul.gated_sm90 import gated_matmul_sm90, refuses_gated_sm90
from pallas_kernels.gated_matmul.xla import gated_matmul_xla


def gated_matmul(
    x: Float[Array, "T E"], weight: Float[Array, "N2 E"], *, activation: str, platform: str
) -> Float[Array, "T N"]:
    """``act(x @ gate.T) * (x @ up.T)``, where ``weight`` is gate's N rows and then up's
    (Shazeer 2020, arXiv:2002.05202).

    ``activation`` is a name of ``XLA_ACTIVATIONS``. ``platform`` is ``"sm_90"`` for Hopper; every
    other value takes XLA. Returns ``x``'s dtype; the kernel rounds once, XLA before the activation
    too.
    """
    (tokens, width), inner = x.shape, weight.shape[0] // 2
    reason = refuses_gated_sm90(tokens, width, inner, x.dtype, activation, platform)
    if reason is None and x.dtype == weight.dtype:
        return gated_matmul_sm90(x, weight, activation=activation)
    return gated_matmul_xla(x, weight, activation=activation)
