"""Differential attention: the difference of two softmaxes, so that what both see in common, noise,
cancels out (Ye et al. 2024, arXiv:2410.05258). Parameters are named as in transformers' DiffLlama.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.kv_cache import LayerPages
from jaxllm.attention.metadata import StepAttention
from jaxllm.attention.variants import variant_of
from jaxllm.config.model import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.layers.attention import output_product
from jaxllm.layers.linear import ColumnLinear
from jaxllm.layers.rotary import RotaryTable, apply_rotary
from jaxllm.weights.mapping import WeightRule, linear_rules

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class DifferentialAttention(nnx.Module):
    """Query head i < H / 2 and head i + H / 2 are the two softmaxes of one pair; likewise keys,
    while both values of a pair, side by side, are its value.

    Both keys of a pair lie side by side in the cache too, and each query has zeros where the other
    key is: so this is grouped-query attention with K / 2 heads of 2 D channels, for which every
    backend serves, and a token takes no more room than without.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype: jnp.dtype):
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.spec = self.spec_of(config, layer)
        # Both of a pair on one device: of queries and keys each half is shared out by itself, and
        # of values too.
        pieces = tuple(count * dim // 2 for count in (heads, kv_heads, kv_heads) for _ in range(2))
        self.qkv = ColumnLinear(config.hidden_size, pieces, bias=config.qkv_bias, dtype=dtype)
        self.o = output_product(config, dtype)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nnx.Param(jnp.zeros((dim,), dtype)) for _ in LAMBDAS
        )
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.rope = config.rope
        self.norm_eps = config.norm_eps

    @classmethod
    def spec_of(cls, config: ModelConfig, layer: int) -> AttentionSpec:
        if config.num_kv_heads % 2 or config.qk_norm:
            raise ConfigError(
                "Differential attention takes an even number of KV heads, and no norm of queries "
                f"and keys; this model has {config.num_kv_heads} KV heads"
                f"{' on each device (share it out over fewer)' if config.shards > 1 else ''}"
                f"{' and such norms' if config.qk_norm else ''}."
            )
        heads = (config.num_heads, config.num_kv_heads // 2, 2 * config.head_dim)
        window, variant = config.window(layer), variant_of(config, layer)
        return AttentionSpec(*heads, scale=config.head_dim**-0.5, window=window, variant=variant)

    @classmethod
    def weight_rules(cls, config: ModelConfig, ours: str, theirs: str) -> list[WeightRule]:
        return [
            *linear_rules(f"{ours}qkv", [f"{theirs}{x}_proj" for x in "qkv"], config.qkv_bias),
            *linear_rules(f"{ours}o", [f"{theirs}o_proj"], config.o_bias),
            *(WeightRule(f"{ours}{name}", (f"{theirs}{name}",)) for name in LAMBDAS),
        ]

    def __call__(
        self, x: Float[Array, "T E"], kv: LayerPages, table: RotaryTable, attend: StepAttention
    ) -> tuple[Float[Array, "T E"], LayerPages]:
        spec, count = self.spec, x.shape[0]
        heads, pairs, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim // 2
        parts = self.qkv(x).reshape(count, -1, dim)
        q, k, v = jnp.split(parts, [heads, heads + 2 * pairs], axis=1)
        q, k = apply_rotary(q, table, self.rope), apply_rotary(k, table, self.rope)
        kv = attend.write_pages(_side_by_side(k), _side_by_side(v), kv)
        first, second = (half.reshape(count, pairs, -1, dim) for half in jnp.split(q, 2, axis=1))
        nothing = jnp.zeros_like(first)
        first = jnp.concatenate([first, nothing], axis=-1)
        second = jnp.concatenate([nothing, second], axis=-1)
        q = jnp.concatenate([first, second], axis=2).reshape(count, heads, 2 * dim)
        out = attend(q, kv, spec).reshape(count, pairs, 2, -1, 2 * dim)
        return self.o(self._combined(out).reshape(count, -1).astype(x.dtype)), kv

    def _combined(self, out: Float[Array, "T P 2 G D"]) -> Float[Array, "T P G D"]:
        """The difference, each head brought to length one; float32."""
        q1, k1, q2, k2 = (getattr(self, name)[...].astype(jnp.float32) for name in LAMBDAS)
        weight = jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + self.lambda_init
        out = out.astype(jnp.float32)
        difference = out[:, :, 0] - weight * out[:, :, 1]
        mean = jnp.mean(difference * difference, axis=-1, keepdims=True)
        return difference * lax.rsqrt(mean + self.norm_eps) * (1 - self.lambda_init)


def _side_by_side(x: Float[Array, "T K D"]) -> Float[Array, "T P E"]:
    """Head i beside head i + K / 2."""
    return jnp.concatenate(jnp.split(x, 2, axis=1), axis=-1)
