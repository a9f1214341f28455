"""Matrix products with weights in Hugging Face's ``[out, in]`` order."""

from typing import override

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxllm.parallel.cuts import Cut, summed


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


class ColumnLinear(Linear):
    """A device's share of the outputs. ``pieces``: how many it has of each of the products that are
    fused here, one after the other.
    """

    def __init__(
        self, in_features: int, pieces: tuple[int, ...], *, bias: bool = False, dtype: jnp.dtype
    ):
        super().__init__(in_features, sum(pieces), bias=bias, dtype=dtype)
        for param in (self.weight, self.bias):
            if param is not None:
                param.set_metadata(cut=Cut(0, pieces))


class RowLinear(Linear):
    """The product of all inputs, of which a device has ``in_features``, its share. With one of
    ``shards`` that is all of them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        shards: int,
        bias: bool = False,
        dtype: jnp.dtype,
    ):
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.weight.set_metadata(cut=Cut(1, (in_features,)))
        self.shards = shards

    @override
    def __call__(self, x: Float[Array, "T I"]) -> Float[Array, "T O"]:
        y = summed(matmul(x, self.weight[...]), self.shards)
        return y if self.bias is None else y + self.bias[...][None]


def matmul(
    x: Float[Array, "T I"], weight: Float[Array, "O I"], out_dtype: jnp.dtype | None = None
) -> Float[Array, "T O"]:
    """``x @ weight.T`` without materialising the transpose."""
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)
