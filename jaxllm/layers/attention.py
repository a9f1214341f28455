"""Self-attention: one fused product, which the attention backend turns into q and the cache."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.attention.backend import AttentionSpec, HeadTransform
from jaxllm.attention.metadata import StepAttention
from jaxllm.config.model import ModelConfig
from jaxllm.layers.linear import Linear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.rotary import RotaryTable
from jaxllm.layers.taps import Taps


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; q/k/v come from one fused product."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: jnp.dtype):
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = Linear(
            config.hidden_size, (heads + 2 * kv_heads) * dim, bias=config.qkv_bias, dtype=dtype
        )
        self.o = Linear(heads * dim, config.hidden_size, bias=config.o_bias, dtype=dtype)
        self.q_norm = RMSNorm(dim, config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.norm_eps, dtype=dtype) if config.qk_norm else None
        self.rope = config.rope
        self.norm_eps = config.norm_eps
        self.spec = AttentionSpec.of(config, layer)

    def __call__(
        self,
        x: Float[Array, "T E"],
        kv: Array,
        table: RotaryTable,
        attend: StepAttention,
        taps: Taps | None = None,
    ) -> tuple[Float[Array, "T E"], Array, Taps | None]:
        q, kv = attend.write(self.qkv(x), kv, self._heads(table), self.spec)
        out = attend(q, kv, self.spec)
        if taps is not None:
            out, taps = taps.heads(out, q, kv, attend, self.spec)
        return self.o(out.reshape(x.shape[0], -1)), kv, taps

    def _heads(self, table: RotaryTable) -> HeadTransform:
        q_norm, k_norm = (
            None if norm is None else norm.weight[...] for norm in (self.q_norm, self.k_norm)
        )
        return HeadTransform(*table, self.rope.interleaved, q_norm, k_norm, self.norm_eps)
