"""A config.json from GGUF metadata. Knows both vocabularies of keys, no tensor data."""

import math
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as QuantType

from jaxllm.errors import CheckpointError
from jaxllm.weights.gguf_header import GGUFHeader

HF_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "glm4": ("Glm4ForCausalLM", "glm4"),
}
STOP_TOKEN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
LLAMA3_LOW_FREQ, LLAMA3_HIGH_FREQ, LLAMA3_CONTEXT = 1.0, 4.0, 8192


class _Metadata:
    """Typed access to one architecture's metadata; what is absent or mistyped is refused."""

    def __init__(self, header: GGUFHeader, architecture: str):
        self._values = header.metadata
        self._prefix = architecture
        self._path = header.path

    def has(self, key: str) -> bool:
        return f"{self._prefix}.{key}" in self._values

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        full = f"{self._prefix}.{key}"
        value = self._values.get(full, default)
        if value is None:
            raise CheckpointError(f"{self._path}: the metadata {full!r} is missing")
        wrong = isinstance(value, bool) or not isinstance(value, kind)
        if wrong or (kind in (int, float) and not (math.isfinite(value) and value >= 0)):
            raise CheckpointError(f"{self._path}: the metadata {full!r} has the value {value!r}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if not 0 < value < 1 << 31:
            raise CheckpointError(f"{self._path}: {self._prefix}.{key} is {value}")
        return value


def _shape(header: GGUFHeader, name: str) -> tuple[int, ...]:
    tensor = header.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        raise CheckpointError(f"{header.path} holds no matrix {name!r}")
    return tensor.shape


def llama3_rope_factors(
    theta: float, dim: int, factor: float, low: float, high: float, context: int
) -> np.ndarray:
    """Divisors of the ``dim / 2`` rotary frequencies under Llama 3.1's scaling."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _rope_scaling(
    meta: _Metadata, header: GGUFHeader, factors: np.ndarray | None, theta: float, dim: int
) -> dict[str, Any] | None:
    if factors is not None:
        # The file keeps only the resulting divisors. They are taken for Llama 3.1's rule, whose
        # largest divisor is the factor, and accepted when that rule gives the same list.
        factor = float(factors.max(initial=1.0))
        rule = (LLAMA3_LOW_FREQ, LLAMA3_HIGH_FREQ, LLAMA3_CONTEXT)
        expected = llama3_rope_factors(theta, dim, factor, *rule) if factor > 0 else factors[:0]
        if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-3):
            raise CheckpointError(f"{header.path}: rope_freqs.weight is not Llama 3.1's scaling")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW_FREQ,
            "high_freq_factor": LLAMA3_HIGH_FREQ,
            "original_max_position_embeddings": LLAMA3_CONTEXT,
        }
    kind = meta.get("rope.scaling.type", str, "none")
    if kind == "none":
        return None
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": float(meta.get("rope.scaling.factor", float, 1.0)),
    }
    if meta.has("rope.scaling.original_context_length"):
        original = meta.positive("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return scaling


def _saved_dtype(header: GGUFHeader) -> str:
    """The dtype of the matrices; bfloat16 for quantized ones, which carry far fewer bits."""
    kinds = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) == 2}
    if kinds == {QuantType.F16}:
        return "float16"
    return "float32" if kinds == {QuantType.F32} else "bfloat16"


def stop_token_ids(header: GGUFHeader) -> list[int]:
    """Ids that end a turn or a text, without repetition, in the order eos, eot, eom."""
    found = (header.metadata.get(f"tokenizer.ggml.{key}") for key in STOP_TOKEN_KEYS)
    return list(dict.fromkeys(i for i in found if isinstance(i, int) and i >= 0))


def hf_config(header: GGUFHeader, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """What config.json of the original model says, as far as the engine reads it."""
    architecture = header.metadata["general.architecture"]
    hf_class, model_type = HF_ARCHITECTURES[architecture]
    meta = _Metadata(header, architecture)
    if meta.get("expert_count", int, 0):
        raise CheckpointError(f"{header.path} is a mixture of experts; dense models only")
    hidden, heads = meta.positive("embedding_length"), meta.positive("attention.head_count")
    if not meta.has("attention.key_length") and hidden % heads:
        raise CheckpointError(f"{header.path}: {heads} heads do not divide {hidden} channels")
    head_dim = meta.positive("attention.key_length", hidden // heads)
    rope_dim = meta.positive("rope.dimension_count", head_dim)
    theta = float(meta.get("rope.freq_base", float, 10000.0))
    vocab_size, embedding_width = _shape(header, "token_embd.weight")
    if embedding_width != hidden or rope_dim > head_dim or theta <= 0:
        raise CheckpointError(f"{header.path}: embedding_length, head width and rope disagree")
    config: dict[str, Any] = {
        "architectures": [hf_class],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": meta.positive("feed_forward_length"),
        "num_hidden_layers": meta.positive("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.positive("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.positive("context_length"),
        "rms_norm_eps": _clean(meta.get("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(meta, header, rope_factors, theta, rope_dim),
        "partial_rotary_factor": rope_dim / head_dim,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": _saved_dtype(header),
        "torch_dtype": _saved_dtype(header),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stop_token_ids(header),
    }
    if architecture == "llama" and (window := meta.get("attention.sliding_window", int, 0)):
        config["architectures"] = ["MistralForCausalLM"]
        config |= {"model_type": "mistral", "sliding_window": window}
    return config


def _clean(value: float) -> float:
    """A float32 as its author wrote it: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))
