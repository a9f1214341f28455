"""SmolLM3: Llama in which every fourth layer has no positions (arXiv:2501.18795)."""

from dataclasses import replace
from typing import Any

from jaxllm.config.model import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.models.decoder import DecoderLM
from jaxllm.models.hf_config import HFConfig

_DEFAULTS = {"rope_theta": 2e6, "tie_word_embeddings": True}  # the class's, where a file has none


class SmolLM3ForCausalLM(DecoderLM):
    @classmethod
    def config_from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        config = HFConfig({**_DEFAULTS, **hf})
        bias = config.flag("attention_bias")
        model = config.model(
            cls.__name__, qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias")
        )
        rotates = _rotates(config, model.num_layers)
        layers = tuple("rotary" if turned else "nope" for turned in rotates)
        windows: tuple[int | None, ...] = ()
        if config.flag("use_sliding_window"):
            windows = config.windows()
            if config.values.get("layer_types") is None:  # then only the others slide
                pairs = zip(windows, rotates, strict=False)
                windows = tuple(None if turned else window for window, turned in pairs)
        return replace(model, attention_layers=layers, sliding_windows=windows)


def _rotates(config: HFConfig, num_layers: int) -> list[bool]:
    flags = config.values.get("no_rope_layers")  # 1 where there *is* rotation
    if flags is None:
        interval = config.integer("no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    known = isinstance(flags, list) and all(flag in (0, 1) for flag in flags)
    if not known or len(flags) < num_layers:
        raise ConfigError(
            f"config.json: no_rope_layers must hold 0 or 1 for each of {num_layers} layers, got "
            f"{flags!r}."
        )
    return [bool(flag) for flag in flags[:num_layers]]
