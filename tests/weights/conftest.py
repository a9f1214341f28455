"""Tiny checkpoints of one-layer Llamas, as a Hugging Face directory and as GGUF files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 4, 2, 16, 256
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ Ġ", "1 1", "Ċ Ċ"]
TOKENS = [
    *ALPHABET,
    *(merge.replace(" ", "") for merge in MERGES),
    "<|begin|>",
    "<|end|>",
    "<tool>",
]
BOS, EOS, TOOL = len(TOKENS) - 3, len(TOKENS) - 2, len(TOKENS) - 1

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "eos_token_id": EOS,
}
SHAPES = {
    "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "model.layers.0.mlp.gate_proj.weight": (FFN, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (FFN, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, FFN),
}
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Channel i of the first half of a head goes to 2i, of the second half to 2i + 1."""
    result = np.empty_like(weight)
    width = weight.shape[0] // heads
    for head in range(heads):
        for i in range(width // 2):
            result[head * width + 2 * i] = weight[head * width + i]
            result[head * width + 2 * i + 1] = weight[head * width + width // 2 + i]
    return result


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {n: generator.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}


@pytest.fixture
def hf_dir(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    save_file(
        {n: w.astype(ml_dtypes.bfloat16) for n, w in weights.items()},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps(CONFIG | {"dtype": "bfloat16"}))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


WriteGGUF = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path, weights: dict[str, np.ndarray]) -> WriteGGUF:
    """write_gguf(name, pre=, architecture=, extra=, replaced=, permute=) -> path."""

    def write(
        name: str = "model.gguf",
        *,
        pre: str | None = "smollm",
        architecture: str = "llama",
        extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
        replaced: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
        permute: bool = True,
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(1)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(FFN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * (len(TOKENS) - 3) + [3, 3, 4])
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(BOS)
        writer.add_eos_token_id(EOS)
        writer.add_chat_template("{{ messages }}")
        extra(writer)
        for hf_name, weight in weights.items():
            tensor_name = GGUF_NAMES[hf_name]
            if replaced and tensor_name in replaced:
                data, kind = replaced[tensor_name]
                writer.add_tensor(tensor_name, data, raw_dtype=kind)
                continue
            if permute and tensor_name == "blk.0.attn_q.weight":
                weight = llama_cpp_permute(weight, HEADS)
            if permute and tensor_name == "blk.0.attn_k.weight":
                weight = llama_cpp_permute(weight, KV_HEADS)
            writer.add_tensor(tensor_name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
