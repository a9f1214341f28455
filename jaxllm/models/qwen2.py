"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115): biases on q, k, v only."""

from typing import Any

from jaxllm.config.model import ModelConfig
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.hf_config import HFConfig


class Qwen2ForCausalLM(DecoderLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config = HFConfig(hf)
        return config.model(cls.__name__, qkv_bias=True, sliding_windows=qwen_windows(config))


def qwen_windows(config: HFConfig) -> tuple[int | None, ...]:
    """Layers from ``max_window_layers`` on slide, and only if ``use_sliding_window`` says so."""
    if not config.flag("use_sliding_window"):
        return ()
    if config.values.get("layer_types") is not None:
        return config.windows()
    first = config.integer("max_window_layers", 28, low=0)
    return tuple(None if i < first else window for i, window in enumerate(config.windows()))
