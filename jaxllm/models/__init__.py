"""Architectures by the name in config.json. A new one is a file here and a line in MODELS."""

from typing import TYPE_CHECKING

from jaxllm.errors import UnknownArchitectureError
from jaxllm.registry import Registry

if TYPE_CHECKING:
    from jaxllm.models.decoder import DecoderLM

MODELS: Registry[type["DecoderLM"]] = Registry(
    "architecture",
    {
        "LlamaForCausalLM": "jaxllm.models.llama:LlamaForCausalLM",
        "MistralForCausalLM": "jaxllm.models.mistral:MistralForCausalLM",
        "Qwen2ForCausalLM": "jaxllm.models.qwen2:Qwen2ForCausalLM",
        "Qwen3ForCausalLM": "jaxllm.models.qwen3:Qwen3ForCausalLM",
        "GlmForCausalLM": "jaxllm.models.glm:GlmForCausalLM",
        "Glm4ForCausalLM": "jaxllm.models.glm:Glm4ForCausalLM",
        "SmolLM3ForCausalLM": "jaxllm.models.smollm3:SmolLM3ForCausalLM",
        "DiffLlamaForCausalLM": "jaxllm.models.diffllama:DiffLlamaForCausalLM",
        "DeepseekV2ForCausalLM": "jaxllm.models.deepseek:DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM": "jaxllm.models.deepseek:DeepseekV3ForCausalLM",
    },
)


def get_model(architecture: str) -> type["DecoderLM"]:
    """Raises UnknownArchitectureError, naming what is known."""
    if architecture not in MODELS:
        raise UnknownArchitectureError(
            f"Architecture {architecture!r} is not implemented; known: {', '.join(MODELS.names())}."
        )
    return MODELS.load(architecture)
