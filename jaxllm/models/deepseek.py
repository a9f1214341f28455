"""DeepSeek-V2 and V3 (arXiv:2405.04434, 2412.19437) where all layers are dense: multi-head latent
attention without experts.
"""

from dataclasses import replace
from typing import Any

from jaxllm.config.model import LatentConfig, ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.hf_config import HFConfig


class DeepseekV2ForCausalLM(DecoderLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config = HFConfig(hf)
        latent = LatentConfig(
            q_rank=None if hf.get("q_lora_rank") is None else config.integer("q_lora_rank"),
            kv_rank=config.integer("kv_lora_rank"),
            nope_dim=config.integer("qk_nope_head_dim"),
            rope_dim=config.integer("qk_rope_head_dim"),
            value_dim=config.integer("v_head_dim"),
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
        dense = config.integer("first_k_dense_replace", 0, low=0)
        if dense < model.num_layers and hf.get("n_routed_experts") is not None:
            raise ConfigError(
                f"config.json: layers from {dense} on (first_k_dense_replace) are mixtures of "
                "experts, which are not implemented; dense layers are."
            )
        return replace(model, attention_layers=("latent",) * model.num_layers)


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """The same, where there are no experts."""
