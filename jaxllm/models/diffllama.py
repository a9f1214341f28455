"""Llama with differential attention (arXiv:2410.05258), as DiffLlama checkpoints have it."""

from dataclasses import replace
from typing import Any

from jaxllm.config.model import ModelConfig
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.hf_config import HFConfig


class DiffLlamaForCausalLM(DecoderLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config = HFConfig(hf)
        bias = config.flag("attention_bias")
        model = config.model(cls.__name__, qkv_bias=bias, o_bias=bias)
        return replace(model, attention_layers=("differential",) * model.num_layers)
