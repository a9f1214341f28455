"""Root-mean-square normalisation, always computed in float32, and the residual add before it."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.norm.api import add_rms_norm
from pallas_kernels.norm.xla import rms_norm


class RMSNorm(nnx.Module):
    """``x / rms(x) * weight`` over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

    ``platform`` as in pallas_kernels' ``add_rms_norm``.
    """

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype, platform: str = "cpu"):
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps
        self.platform = platform

    def __call__(self, x: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
        return rms_norm(x, self.weight[...], eps=self.eps)

    def add(
        self, x: Float[Array, "T N"], branch: Float[Array, "T N"] | None
    ) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
        """The norm of ``x + branch``, and the sum, in one pass over both. None adds nothing."""
        if branch is None:
            return self(x), x
        return add_rms_norm(x, branch, self.weight[...], eps=self.eps, platform=self.platform)
