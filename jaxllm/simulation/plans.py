"""Plans small enough that every corner is met within a few steps."""

from jaxllm.config.model import ModelConfig, RopeConfig
from jaxllm.config.plan import EnginePlan, make_buckets

VOCAB_SIZE = 40
EOS = 3


def tiny_model(vocab_size: int = VOCAB_SIZE) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        rope=RopeConfig(theta=1e4, dim=8),
        norm_eps=1e-5,
        max_position_embeddings=1024,
    )


def make_plan(
    *,
    max_model_len: int = 64,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    block_size: int = 4,
    num_blocks: int = 64,
    vocab_size: int = VOCAB_SIZE,
    prefix_caching: bool = True,
    host_blocks: int = 0,
    offloading: bool = False,
    kv_files: bool = False,
) -> EnginePlan:
    rows = tuple(sorted({min(2**i, max_num_seqs) for i in range(1, 12)}))
    tokens = tuple(sorted({min(2**i, max_num_batched_tokens) for i in range(3, 15)}))
    return EnginePlan(
        model=tiny_model(vocab_size),
        dtype="float32",
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_blocks=num_blocks,
        buckets=make_buckets(rows, tokens, max_num_seqs),
        attention_backend="fake",
        attention_reason="no device",
        prefix_caching=prefix_caching,
        host_blocks=host_blocks,
        offloading=offloading,
        kv_files=kv_files,
    )
