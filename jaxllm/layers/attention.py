"""Self-attention: makes q, k, v, hands them to the attention backend, projects the result."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.metadata import StepAttention
from jaxllm.config.model import ModelConfig
from jaxllm.layers.linear import Linear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.rotary import RotaryTable, apply_rotary


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
        self.spec = AttentionSpec.of(config, layer)

    def __call__(
        self, x: Float[Array, "T E"], kv: Array, table: RotaryTable, attend: StepAttention
    ) -> tuple[Float[Array, "T E"], Array]:
        heads, kv_heads, dim = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        parts = self.qkv(x).reshape(x.shape[0], heads + 2 * kv_heads, dim)
        q, k, v = jnp.split(parts, [heads, heads + kv_heads], axis=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, table, self.rope), apply_rotary(k, table, self.rope)
        out, kv = attend(q, k, v, kv, self.spec)
        return self.o(out.reshape(x.shape[0], heads * dim)), kv
