"""GLM-4, the ChatGLM line (arXiv:2406.12793): GlmForCausalLM (GLM-4-9B) and Glm4ForCausalLM
(GLM-4-0414).

Half of each head is rotated, in interleaved pairs; gate and up come fused in the checkpoint.
The 0414 models normalise each branch once more before it is added.
"""

from typing import Any

from jaxllm.config.model import ModelConfig
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.hf_config import HFConfig
from jaxllm.weights.mapping import WeightRule


class GlmForCausalLM(DecoderLM):
    sandwich_norms = False

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config = HFConfig({"partial_rotary_factor": 0.5, **hf})
        return config.model(
            cls.__name__,
            interleaved_rope=True,
            qkv_bias=config.flag("attention_bias"),
            sandwich_norms=cls.sandwich_norms,
        )

    @classmethod
    def layer_rules(
        cls, config: ModelConfig, layer: int, ours: str, theirs: str
    ) -> list[WeightRule]:
        gate_up = WeightRule(f"{ours}mlp.gate_up.weight", (f"{theirs}mlp.gate_up_proj.weight",))
        rules = super().layer_rules(config, layer, ours, theirs)
        rules = [gate_up if rule.target == gate_up.target else rule for rule in rules]
        if config.sandwich_norms:
            rules += [
                WeightRule(
                    f"{ours}attention_out_norm.weight",
                    (f"{theirs}post_self_attn_layernorm.weight",),
                ),
                WeightRule(f"{ours}mlp_out_norm.weight", (f"{theirs}post_mlp_layernorm.weight",)),
            ]
        return rules


class Glm4ForCausalLM(GlmForCausalLM):
    sandwich_norms = True
