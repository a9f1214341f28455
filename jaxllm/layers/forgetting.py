"""Attention that forgets (Lin et al. 2025, arXiv:2503.02130): every token has a gate, computed of
it, by which all tokens before it fade. Parameters are named as in the authors' code.
"""

from dataclasses import replace
from typing import ClassVar, override

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.kv_cache import LayerPages
from jaxllm.attention.metadata import StepAttention
from jaxllm.config.model import ModelConfig
from jaxllm.layers.attention import Attention
from jaxllm.layers.linear import ColumnLinear
from jaxllm.layers.rotary import RotaryTable
from jaxllm.weights.mapping import WeightRule, linear_rules
from pallas_kernels.attention.variants.forgetting import DECAY, forgetting


class ForgettingAttention(Attention):
    """One gate per KV head, so per head in the paper's models, which have no groups. What is kept
    of a token is the sum of the gates' logarithms up to it, beside its key.
    """

    computes: ClassVar[tuple[str, ...]] = (DECAY.name,)

    def __init__(self, config: ModelConfig, layer: int, *, dtype: jnp.dtype):
        super().__init__(config, layer, dtype=dtype)
        heads = (config.num_kv_heads,)
        self.gate = ColumnLinear(config.hidden_size, heads, bias=True, dtype=dtype)

    @override
    @classmethod
    def spec_of(cls, config: ModelConfig, layer: int) -> AttentionSpec:
        spec = super().spec_of(config, layer)
        if DECAY in spec.variant.params:
            return spec
        return replace(spec, variant=forgetting(spec.variant))

    @override
    @classmethod
    def weight_rules(cls, config: ModelConfig, ours: str, theirs: str) -> list[WeightRule]:
        gate = linear_rules(f"{ours}gate", [f"{theirs}fgate_proj"], True)
        return [*super().weight_rules(config, ours, theirs), *gate]

    @override
    def __call__(
        self, x: Float[Array, "T E"], kv: LayerPages, table: RotaryTable, attend: StepAttention
    ) -> tuple[Float[Array, "T E"], LayerPages]:
        logs = jax.nn.log_sigmoid(self.gate(x).astype(jnp.float32))
        decay = attend.running_sum(DECAY.name, logs, kv, self.spec)
        kv = attend.write_token_param(DECAY.name, decay, kv, self.spec)
        return super().__call__(x, kv, table, attend)
