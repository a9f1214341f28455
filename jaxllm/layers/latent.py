"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one vector per token stands for the
keys and values of all heads. Parameters are named as in transformers' DeepseekV2 and V3.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.kv_cache import LayerPages
from jaxllm.attention.metadata import StepAttention
from jaxllm.attention.variants import variant_of
from jaxllm.config.model import LatentConfig, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.layers.linear import Linear
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.rotary import RotaryTable, apply_rotary
from jaxllm.weights.mapping import WeightRule, linear_rules

NORM_EPS = 1e-6  # of the norms inside, whatever the model's others have


class LatentAttention(nnx.Module):
    """The cache holds of a token its latent (``kv_rank`` channels) and one rotated key
    (``rope_dim``), for all heads: the matrices that would make keys and values of the latent are
    absorbed into queries and answers. So every head attends over one KV head of ``kv_rank +
    rope_dim`` channels, whose first ``kv_rank`` are the value.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype: jnp.dtype):
        self.spec, self.latent = self.spec_of(config, layer), _latent(config)
        latent, heads, hidden = self.latent, config.num_heads, config.hidden_size
        q_width = heads * (latent.nope_dim + latent.rope_dim)
        rank, bias = latent.q_rank, config.qkv_bias
        self.q_a = None if rank is None else Linear(hidden, rank, bias=bias, dtype=dtype)
        self.q_a_norm = None if rank is None else RMSNorm(rank, NORM_EPS, dtype=dtype)
        self.q = Linear(rank or hidden, q_width, dtype=dtype)
        kv_width = latent.kv_rank + latent.rope_dim
        self.kv_a = Linear(hidden, kv_width, bias=bias, dtype=dtype)
        self.kv_a_norm = RMSNorm(latent.kv_rank, NORM_EPS, dtype=dtype)
        of_heads = heads * (latent.nope_dim + latent.value_dim)
        self.kv_b = Linear(latent.kv_rank, of_heads, dtype=dtype)
        self.o = Linear(heads * latent.value_dim, hidden, bias=config.o_bias, dtype=dtype)
        self.rope = config.rope

    @classmethod
    def spec_of(cls, config: ModelConfig, layer: int) -> AttentionSpec:
        latent = _latent(config)
        return AttentionSpec(
            config.num_heads,
            num_kv_heads=1,
            head_dim=latent.kv_rank + latent.rope_dim,
            scale=latent.score_factor * (latent.nope_dim + latent.rope_dim) ** -0.5,
            window=config.window(layer),
            variant=variant_of(config, layer),
            value_dim=latent.kv_rank,
        )

    @classmethod
    def weight_rules(cls, config: ModelConfig, ours: str, theirs: str) -> list[WeightRule]:
        rules = [
            *linear_rules(f"{ours}kv_a", [f"{theirs}kv_a_proj_with_mqa"], config.qkv_bias),
            WeightRule(f"{ours}kv_a_norm.weight", (f"{theirs}kv_a_layernorm.weight",)),
            *linear_rules(f"{ours}kv_b", [f"{theirs}kv_b_proj"], bias=False),
            *linear_rules(f"{ours}o", [f"{theirs}o_proj"], config.o_bias),
        ]
        if _latent(config).q_rank is None:
            return rules + linear_rules(f"{ours}q", [f"{theirs}q_proj"], bias=False)
        return [
            *rules,
            *linear_rules(f"{ours}q_a", [f"{theirs}q_a_proj"], config.qkv_bias),
            WeightRule(f"{ours}q_a_norm.weight", (f"{theirs}q_a_layernorm.weight",)),
            *linear_rules(f"{ours}q", [f"{theirs}q_b_proj"], bias=False),
        ]

    def __call__(
        self, x: Float[Array, "T E"], kv: LayerPages, table: RotaryTable, attend: StepAttention
    ) -> tuple[Float[Array, "T E"], LayerPages]:
        count, rank = x.shape[0], self.latent.kv_rank
        made = self.kv_a(x)
        key = apply_rotary(made[:, None, rank:], table, self.rope)
        latent = self.kv_a_norm(made[:, :rank])[:, None]
        kv = attend.write_pages(jnp.concatenate([latent, key], axis=-1), None, kv)
        nope, turned = jnp.split(self._queries(x), [self.latent.nope_dim], axis=-1)
        turned = apply_rotary(turned, table, self.rope)
        by_head = self.kv_b.weight[...].reshape(self.spec.num_heads, -1, rank)
        to_key, to_value = jnp.split(by_head, [self.latent.nope_dim], axis=1)
        q = jnp.concatenate([jnp.einsum("thd,hdr->thr", nope, to_key), turned], axis=-1)
        out = jnp.einsum("thr,hvr->thv", attend(q, kv, self.spec), to_value)
        return self.o(out.reshape(count, -1)), kv

    def _queries(self, x: Float[Array, "T E"]) -> Float[Array, "T H D"]:
        if self.q_a is not None and self.q_a_norm is not None:
            x = self.q_a_norm(self.q_a(x))
        return self.q(x).reshape(x.shape[0], self.spec.num_heads, -1)


def _latent(config: ModelConfig) -> LatentConfig:
    if config.latent is None:
        raise ConfigError(
            f"Latent attention needs a model whose config.json has its ranks (kv_lora_rank and "
            f"others); {config.architecture} has none."
        )
    return config.latent
