"""Self-attention: one fused product, which the attention backend turns into q and the cache. What
every attention layer must offer says jaxllm/attention/layers.py.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.attention.backend import AttentionSpec, HeadTransform
from jaxllm.attention.kv_cache import LayerPages
from jaxllm.attention.metadata import StepAttention
from jaxllm.attention.variants import variant_of
from jaxllm.config.model import ModelConfig
from jaxllm.layers.linear import ColumnLinear, RowLinear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.rotary import RotaryTable
from jaxllm.weights.mapping import WeightRule, linear_rules


def output_product(config: ModelConfig, dtype: jnp.dtype) -> RowLinear:
    """From the answers of all heads back to the residual stream."""
    sizes = config.num_heads * config.head_dim, config.hidden_size
    return RowLinear(*sizes, shards=config.shards, bias=config.o_bias, dtype=dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; q/k/v come from one fused product."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: jnp.dtype):
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        pieces = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.qkv = ColumnLinear(config.hidden_size, pieces, bias=config.qkv_bias, dtype=dtype)
        self.o = output_product(config, dtype)
        self.q_norm = RMSNorm(dim, config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.rope = config.rope
        self.norm_eps = config.norm_eps
        self.spec = self.spec_of(config, layer)

    @classmethod
    def spec_of(cls, config: ModelConfig, layer: int) -> AttentionSpec:
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        window, variant = config.window(layer), variant_of(config, layer)
        return AttentionSpec(*heads, scale=config.head_dim**-0.5, window=window, variant=variant)

    @classmethod
    def weight_rules(cls, config: ModelConfig, ours: str, theirs: str) -> list[WeightRule]:
        rules = [
            *linear_rules(f"{ours}qkv", [f"{theirs}{x}_proj" for x in "qkv"], config.qkv_bias),
            *linear_rules(f"{ours}o", [f"{theirs}o_proj"], config.o_bias),
        ]
        if config.qk_norm:
            norms = ("q_norm.weight", "k_norm.weight")
            rules += [WeightRule(f"{ours}{norm}", (f"{theirs}{norm}",)) for norm in norms]
        return rules

    def __call__(
        self, x: Float[Array, "T E"], kv: LayerPages, table: RotaryTable, attend: StepAttention
    ) -> tuple[Float[Array, "T E"], LayerPages]:
        q, kv = attend.write(self.qkv(x), kv, self._heads(table), self.spec)
        out = attend(q, kv, self.spec)
        return self.o(out.reshape(x.shape[0], -1)), kv

    def _heads(self, table: RotaryTable) -> HeadTransform:
        q_norm, k_norm = (
            None if norm is None else norm.weight[...] for norm in (self.q_norm, self.k_norm)
        )
        return HeadTransform(*table, self.rope.interleaved, q_norm, k_norm, self.norm_eps)
