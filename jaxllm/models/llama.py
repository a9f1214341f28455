"""Llama 2, 3 and 3.1 (arXiv:2307.09288, 2407.21783), SmolLM2 and what else uses the class."""

from typing import Any

from jaxllm.config.model import ModelConfig
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.hf_config import HFConfig


class LlamaForCausalLM(DecoderLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config = HFConfig(hf)
        bias = config.flag("attention_bias")
        return config.model(
            cls.__name__, qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias")
        )
