"""Mistral 7B and its dense successors (arXiv:2310.06825): Llama with an optional sliding window."""

from typing import Any

from jaxllm.config.model import ModelConfig
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.hf_config import HFConfig


class MistralForCausalLM(DecoderLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config = HFConfig(hf)
        return config.model(cls.__name__, sliding_windows=config.windows())
