"""Matrix products with weights in Hugging Face's ``[out, in]`` order."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """``x @ weight.T + bias``; accumulates in float32 where the hardware does, returns
    ``x.dtype``.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: jnp.dtype
    ):
        self.weight = nnx.Param(jnp.zeros((out_features, in_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        y = matmul(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...][None]


def matmul(
    x: Float[Array, "T I"], weight: Float[Array, "O I"], out_dtype: jnp.dtype | None = None
) -> Float[Array, "T O"]:
    """``x @ weight.T`` without materialising the transpose."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)
