"""GGUF files as Hugging Face checkpoints: names, config and weight layout translated. No JAX.

Quantized tensors are dequantized when read. Only dense architectures whose translation is known
exactly are accepted; the tokenizer is gguf_tokenizer.py's.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import dequantize
from gguf.constants import GGMLQuantizationType as QuantType

from jaxllm.errors import CheckpointError, UnknownArchitectureError
from jaxllm.weights.gguf_config import hf_config
from jaxllm.weights.gguf_header import GGUFHeader, GGUFTensor
from jaxllm.weights.sources import TensorInfo, check_layer_count

PLAIN_TYPES: dict[QuantType, np.dtype] = {
    QuantType.F32: np.dtype(np.float32),
    QuantType.F16: np.dtype(np.float16),
    QuantType.BF16: np.dtype(ml_dtypes.bfloat16),
}
QUANTIZED_TYPES = frozenset(
    {QuantType.Q8_0, QuantType.Q4_0, QuantType.Q4_1, QuantType.Q4_K, QuantType.Q6_K}
)

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_DENSE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLM4 = {
    **_DENSE,
    "ffn_up": "mlp.gate_up_proj",
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
BLOCK_NAMES = {"llama": _DENSE, "qwen2": _DENSE, "qwen3": _DENSE, "glm4": _GLM4}
CONSUMED = frozenset({"rope_freqs.weight"})  # expressed in the config as rope_scaling


def hf_name(name: str, architecture: str) -> str:
    """The Hugging Face name of a GGUF tensor; unknown names come back as they are."""
    stem, dot, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}{dot}{kind}"
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in BLOCK_NAMES[architecture]:
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[architecture][parts[2]]}{dot}{kind}"
    return name


def undo_rope_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows ``[H * D, ...]`` from llama.cpp's interleaved rotary order back to halves.

    llama.cpp stores the channel pairs of arch llama side by side (0, D/2, 1, D/2 + 1, ...); the
    other architectures keep Hugging Face's order.
    """
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


class GGUFSource:
    """One GGUF file, presented as the Hugging Face checkpoint it was made from."""

    def __init__(self, path: Path | str):
        self.header = GGUFHeader(path)
        self.architecture = self.header.metadata.get("general.architecture")
        if self.architecture not in BLOCK_NAMES:
            raise UnknownArchitectureError(
                f"{path} holds a model of architecture {self.architecture!r}; "
                f"GGUF is read for {', '.join(sorted(BLOCK_NAMES))}"
            )
        self._tensors: dict[str, GGUFTensor] = {}
        for name, tensor in self.header.tensors.items():
            if name in CONSUMED:
                continue
            if tensor.type not in PLAIN_TYPES and tensor.type not in QUANTIZED_TYPES:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is quantized as {tensor.type.name}, which is not "
                    f"supported; use a file of {', '.join(sorted(t.name for t in QUANTIZED_TYPES))}"
                )
            translated = hf_name(name, self.architecture)
            if translated in self._tensors:
                raise CheckpointError(f"{path}: two tensors become {translated!r}")
            self._tensors[translated] = tensor
        self.config: dict[str, Any] = hf_config(self.header, self._read_rope_factors())
        check_layer_count(self.config, len(self._tensors), str(path))
        self._permuted_heads = self._find_permuted()

    def _read_rope_factors(self) -> np.ndarray | None:
        tensor = self.header.tensors.get("rope_freqs.weight")
        if tensor is None:
            return None
        if tensor.type is not QuantType.F32 or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
            raise CheckpointError(f"{self.header.path}: rope_freqs.weight must be a short F32 list")
        return self.header.data[tensor.begin : tensor.end].view(np.float32)

    def _find_permuted(self) -> dict[str, int]:
        """Number of heads of every tensor that llama.cpp permuted, by Hugging Face name."""
        if self.architecture != "llama":
            return {}
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }
        permuted: dict[str, int] = {}
        for name, tensor in self._tensors.items():
            parts = name.split(".")
            if len(parts) > 2 and parts[-2] in heads:
                count = heads[parts[-2]]
                if tensor.shape[0] % (2 * count):
                    raise CheckpointError(
                        f"{self.header.path}: {name!r} has {tensor.shape[0]} rows, which {count} "
                        "heads of even width do not divide"
                    )
                permuted[name] = count
        return permuted

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensor(name)
        return TensorInfo(tensor.shape, PLAIN_TYPES.get(tensor.type, np.dtype(np.float32)).name)

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensor(name)
        raw = self.header.data[tensor.begin : tensor.end]
        if tensor.type in PLAIN_TYPES:
            weight = raw.view(PLAIN_TYPES[tensor.type]).reshape(tensor.shape)
        else:
            rows = raw.reshape(*tensor.shape[:-1], -1)
            # A block's scale may be inf or nan in a damaged file; the values are checked by whoever
            # runs them, so numpy need not warn here.
            with np.errstate(all="ignore"):
                weight = dequantize(rows, tensor.type).reshape(tensor.shape)
        heads = self._permuted_heads.get(name)
        return weight if heads is None else undo_rope_permutation(weight, heads)

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.header.path} holds no tensor {name!r}") from None
