"""Residual add and RMS norm: the kernel where it takes the shape, plain XLA elsewhere."""

from jaxtyping import Array, Float

from pallas_kernels.norm.add_rms_norm_sm90 import add_rms_norm_sm90, refuses_add_rms_norm_sm90
from pallas_kernels.norm.xla import add_rms_norm_xla


def add_rms_norm(
    x: Float[Array, "T N"],
    branch: Float[Array, "T N"],
    weight: Float[Array, " N"],
    *,
    eps: float,
    platform: str,
) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
    """``(s / rms(s) * weight, s)`` where ``s = x + branch``, row by row.

    The sum is rounded to ``x``'s dtype and normed in float32; the norm is rounded before it is
    multiplied by ``weight``, and after. A row's bits do not depend on the other rows. ``platform``
    is ``"sm_90"`` for Hopper; every other value takes XLA.
    """
    reason = refuses_add_rms_norm_sm90(x.shape[1], x.dtype, platform)
    if reason is None and x.dtype == branch.dtype == weight.dtype:
        return add_rms_norm_sm90(x, branch, weight, eps=eps)
    return add_rms_norm_xla(x, branch, weight, eps=eps)
