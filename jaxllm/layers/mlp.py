"""The gated feed-forward block (Shazeer 2020, arXiv:2002.05202), gate and up fused in one
product.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.config.model import ModelConfig
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.weights.mapping import WeightRule, linear_rules
from pallas_kernels.gated_matmul.activations import XLA_ACTIVATIONS
from pallas_kernels.gated_matmul.api import gated_matmul


class GatedMLP(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, platform: str):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = ColumnLinear(hidden, (inner, inner), bias=config.mlp_bias, dtype=dtype)
        self.down = RowLinear(
            inner, hidden, shards=config.shards, bias=config.mlp_bias, dtype=dtype
        )
        self.hidden_act = config.hidden_act
        self.platform = platform

    @classmethod
    def weight_rules(cls, config: ModelConfig, ours: str, theirs: str) -> list[WeightRule]:
        gate_up = [f"{theirs}{name}_proj" for name in ("gate", "up")]
        return [
            *linear_rules(f"{ours}gate_up", gate_up, config.mlp_bias),
            *linear_rules(f"{ours}down", [f"{theirs}down_proj"], config.mlp_bias),
        ]

    def __call__(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        if self.gate_up.bias is None:
            weight, name = self.gate_up.weight[...], self.hidden_act
            return self.down(gated_matmul(x, weight, activation=name, platform=self.platform))
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(XLA_ACTIVATIONS[self.hidden_act](gate) * up)
