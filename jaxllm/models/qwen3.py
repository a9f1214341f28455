"""Qwen3, dense (arXiv:2505.09388): RMSNorm on every head of q and k before the rotation."""

from typing import Any

from jaxllm.config.model import ModelConfig
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.hf_config import HFConfig
from jaxllm.models.qwen2 import qwen_windows


class Qwen3ForCausalLM(DecoderLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config = HFConfig(hf)
        bias = config.flag("attention_bias")
        return config.model(
            cls.__name__,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=True,
            sliding_windows=qwen_windows(config),
        )
