"""DeepSeek-V2 and V3 (arXiv:2405.04434, 2412.19437): multi-head latent attention and mixtures of
experts.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

from jaxllm.config.model import ExpertsConfig, LatentConfig, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.hf_config import HFConfig


class DeepseekV2ForCausalLM(DecoderLM):
    scoring: ClassVar[Literal["softmax", "sigmoid"]] = "softmax"
    routing: ClassVar[dict[str, Any]] = {}  # what a file means that does not say

    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config = HFConfig({**cls.routing, **hf})
        latent = LatentConfig(
            q_rank=None if hf.get("q_lora_rank") is None else config.integer("q_lora_rank"),
            kv_rank=config.integer("kv_lora_rank"),
            nope_dim=config.integer("qk_nope_head_dim"),
            rope_dim=config.integer("qk_rope_head_dim"),
            value_dim=config.integer("v_head_dim"),
            score_factor=config.yarn_scores(),
        )
        bias = config.flag("attention_bias")
        model = HFConfig({**hf, "head_dim": latent.rope_dim}).model(
            cls.__name__,
            interleaved_rope=config.flag("rope_interleave", True),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=config.flag("mlp_bias"),
            latent=latent,
        )
        layers = ("latent",) * model.num_layers
        return replace(model, attention_layers=layers, experts=cls._experts(config, model))

    @classmethod
    def _experts(cls, config: HFConfig, model: ModelConfig) -> ExpertsConfig | None:
        first = config.integer("first_k_dense_replace", 0, low=0)
        if config.values.get("n_routed_experts") is None or first >= model.num_layers:
            return None
        cls._check_routing(config, model)
        count, size = config.integer("n_routed_experts"), config.integer("moe_intermediate_size")
        groups, kept = config.integer("n_group", 1), config.integer("topk_group", 1)
        if config.text("topk_method", "greedy") == "greedy":
            groups = kept = 1
        least = groups if cls.scoring == "softmax" else 2 * groups
        if count % groups or count < least or kept > groups:
            raise ConfigError(
                f"config.json: {count} n_routed_experts cannot be {groups} n_group, of which "
                f"topk_group is {kept}."
            )
        return ExpertsConfig(
            first_layer=first,
            count=count,
            chosen=config.integer("num_experts_per_tok", high=count // groups * kept),
            size=size,
            shared_size=config.integer("n_shared_experts", 0, low=0) * size,
            factor=config.number("routed_scaling_factor", 1.0),
            scoring=cls.scoring,
            normalised=config.flag("norm_topk_prob"),
            groups=groups,
            groups_chosen=kept,
        )

    @classmethod
    def _check_routing(cls, config: HFConfig, model: ModelConfig) -> None:
        """Raises ConfigError for what files of other models say."""
        methods = ("greedy", "group_limited_greedy") if cls.scoring == "softmax" else ("noaux_tc",)
        method = config.text("topk_method", methods[0])
        if method not in methods:
            raise ConfigError(
                f"config.json: topk_method {method!r} is not supported ({', '.join(methods)})."
            )
        for key, wanted in (("scoring_func", cls.scoring), ("moe_layer_freq", 1)):
            if (config.values.get(key) or wanted) != wanted:
                raise ConfigError(f"config.json: {key} must be {wanted!r} here.")
        if model.mlp_bias or (cls.scoring == "softmax" and config.flag("norm_topk_prob")):
            raise ConfigError("config.json: experts take no mlp_bias, and V2's no norm_topk_prob.")


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    scoring = "sigmoid"
    routing: ClassVar[dict[str, Any]] = {
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    }

    @classmethod
    def ignored(cls, config: ModelConfig) -> tuple[str, ...]:
        """And the layer behind the last, which predicts a second token."""
        return (*super().ignored(config), f"model.layers.{config.num_layers}.")
