"""Mixtures of experts in place of the feed-forward block (DeepSeekMoE, arXiv:2401.06066).
Parameters are named as in transformers' DeepseekV2 and V3.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxllm.config.model import ExpertsConfig, ModelConfig
from jaxllm.layers.linear import Linear, matmul
from jaxllm.weights.mapping import WeightRule
from pallas_kernels.gated_matmul.api import gated_matmul


class Experts(nnx.Module):
    """All experts side by side are one wide gated block, whose inner channels are multiplied by the
    weight of their expert: zero where it was not chosen, one for those that all tokens share.

    So nothing is sorted, no token waits for others of its expert, and a token's bits depend on its
    company as little as in a dense block.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, platform: str):
        assert config.experts is not None
        self.experts, hidden = config.experts, config.hidden_size
        inner, count = self.experts.inner_size, self.experts.count
        self.router = Linear(hidden, count, dtype=dtype)
        corrected = self.experts.scoring == "sigmoid"
        self.choice_bias = nnx.Param(jnp.zeros((count,), jnp.float32)) if corrected else None
        self.gate_up = Linear(hidden, 2 * inner, dtype=dtype)
        self.down = Linear(inner, hidden, dtype=dtype)
        self.hidden_act = config.hidden_act
        self.platform = platform

    @classmethod
    def weight_rules(cls, config: ModelConfig, ours: str, theirs: str) -> list[WeightRule]:
        experts = config.experts
        assert experts is not None
        blocks = [f"{theirs}experts.{index}." for index in range(experts.count)]
        blocks += [f"{theirs}shared_experts."] if experts.shared_size else []
        gate_up = tuple(f"{block}{name}_proj.weight" for name in ("gate", "up") for block in blocks)
        down = tuple(f"{block}down_proj.weight" for block in blocks)
        rules = [
            WeightRule(f"{ours}router.weight", (f"{theirs}gate.weight",)),
            WeightRule(f"{ours}gate_up.weight", gate_up),
            WeightRule(f"{ours}down.weight", down, axis=1),
        ]
        if experts.scoring == "sigmoid":
            bias = f"{theirs}gate.e_score_correction_bias"
            rules.append(WeightRule(f"{ours}choice_bias", (bias,)))
        return rules

    def __call__(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        weight, experts = self.gate_up.weight[...], self.experts
        inner = gated_matmul(x, weight, activation=self.hidden_act, platform=self.platform)
        logits = matmul(x, self.router.weight[...], jnp.dtype(jnp.float32))
        bias = None if self.choice_bias is None else self.choice_bias[...]
        each = jnp.repeat(expert_weights(logits, bias, experts), experts.size, axis=1)
        shared = jnp.ones((x.shape[0], experts.shared_size), jnp.float32)
        weights = jnp.concatenate([each, shared], axis=1)
        scaled = inner.astype(jnp.float32) * weights
        # What was not chosen may have overflowed in float16, and 0 * inf is NaN.
        return self.down(jnp.where(weights > 0.0, scaled, 0.0).astype(x.dtype))


def expert_weights(
    logits: Float[Array, "T X"], bias: Float[Array, " X"] | None, experts: ExpertsConfig
) -> Float[Array, "T X"]:
    """How much of each expert a token takes, float32; zero of all but the chosen."""
    scores = jax.nn.softmax(logits) if bias is None else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias[None]
    if experts.groups > 1:
        grouped = choice.reshape(len(choice), experts.groups, -1)
        best = jnp.sum(lax.top_k(grouped, 1 if bias is None else 2)[0], axis=-1)
        kept = _chosen(best, experts.groups_chosen)[:, :, None]
        choice = jnp.where(kept, grouped, -jnp.inf).reshape(choice.shape)
    weights = jnp.where(_chosen(choice, experts.chosen), scores, 0.0)
    if experts.normalised:
        weights = weights / (jnp.sum(weights, axis=1, keepdims=True) + 1e-20)
    return weights * experts.factor


def _chosen(scores: Float[Array, "T N"], count: int) -> Array:
    """[T, N]: whether among the largest, of equals the first."""
    index = lax.top_k(scores, count)[1]
    return jnp.any(index[:, :, None] == jnp.arange(scores.shape[1])[None, None], axis=1)
