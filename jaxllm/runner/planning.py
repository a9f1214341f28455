"""Decides shapes and sizes: an EnginePlan from what was asked, what the model is, and the
device.
"""

import logging

import jax
import jax.numpy as jnp

from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import EnginePlan, make_buckets
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.params import ModelDef
from jaxllm.runner import memory
from jaxllm.runner.row_layout import MAX_EOS_IDS, RowLayout

logger = logging.getLogger(__name__)

# (max_num_seqs, max_num_batched_tokens) where the user named none.
_DEFAULTS = {"cpu": (16, 256), "gpu": (256, 8192)}
_MIXED_LADDER = {"cpu": (64, 128, 256, 512), "gpu": (256, 512, 1024, 2048, 4096, 8192, 16384)}
_ROW_LADDER = {"cpu": (2, 8, 32, 128), "gpu": (1, 8, 64, 128, 256, 512)}


def make_plan(
    config: EngineConfig, model: ModelDef, dtype: str, backend: str, reason: str
) -> EnginePlan:
    """Raises ConfigError or OutOfMemoryError, before anything is loaded, if it cannot work."""
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    max_num_seqs = config.max_num_seqs or _DEFAULTS[platform][0]
    max_tokens = config.max_num_batched_tokens or max(_DEFAULTS[platform][1], max_num_seqs)
    if max_tokens < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens ({max_tokens}) must be at least --max-num-seqs "
            f"({max_num_seqs}): every running request needs one token per step."
        )
    _check_eos_ids(model)
    max_model_len = _asked_length(config, model)
    blocks_per_row = -(-max_model_len // config.block_size)
    width = _row_width(max_num_seqs, blocks_per_row)
    rows = row_sizes(platform, max_num_seqs)
    other = (
        memory.weight_bytes(model)
        + memory.row_buffer_bytes(model.config, max_num_seqs, width)
        + memory.scratch_bytes(model.config, max_tokens, rows[-1], jnp.dtype(dtype).itemsize)
    )
    blocks = memory.num_blocks(
        config, model.config, dtype, other_bytes=other, wanted=max_num_seqs * blocks_per_row + 1
    )
    max_model_len = _fitting_length(config, max_model_len, blocks)
    return EnginePlan(
        model=model.config,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        block_size=config.block_size,
        num_blocks=blocks,
        buckets=make_buckets(rows, mixed_sizes(platform, rows[-1], max_tokens), rows[-1]),
        attention_backend=backend,
        attention_reason=reason,
    )


def row_sizes(platform: str, max_num_seqs: int) -> tuple[int, ...]:
    """Rows of the decode buckets.

    On a CPU XLA converts every bf16 weight to float32 when there is only one row, which costs seven
    times as much as two rows: so the smallest is 2 there. On a GPU a step of 9 rows costs what one
    of 64 does, since reading the weights takes the time: so there are few.
    """
    ladder = _ROW_LADDER[platform]
    return (*(size for size in ladder if size < max_num_seqs), max(max_num_seqs, ladder[0]))


def mixed_sizes(platform: str, num_rows: int, max_tokens: int) -> tuple[int, ...]:
    """Tokens of the mixed buckets; each holds a token of every row."""
    below = [size for size in _MIXED_LADDER[platform] if num_rows <= size < max_tokens]
    return (*below, max(max_tokens, num_rows))


def _check_eos_ids(model: ModelDef) -> None:
    ids, vocab_size = model.config.eos_token_ids, model.config.vocab_size
    if len(ids) > MAX_EOS_IDS or any(token_id >= vocab_size for token_id in ids):
        raise ConfigError(
            f"eos_token_id of config.json and generation_config.json must name at most "
            f"{MAX_EOS_IDS} ids below vocab_size ({vocab_size}), got {list(ids)}."
        )


def _row_width(max_num_seqs: int, blocks_per_row: int) -> int:
    """Cells of a row; the step names a cell of all rows by one int32."""
    width = RowLayout(blocks_per_row).width
    if (max_num_seqs + 1) * width >= 2**31:
        raise ConfigError(
            f"--max-num-seqs ({max_num_seqs}) times {blocks_per_row} KV-cache blocks per row are "
            "too many to count. Lower --max-num-seqs or --max-model-len, or raise --block-size."
        )
    return width


def _asked_length(config: EngineConfig, model: ModelDef) -> int:
    limit = model.config.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the model's "
            f"max_position_embeddings ({limit}); lower it."
        )
    return config.max_model_len


def _fitting_length(config: EngineConfig, length: int, blocks: int) -> int:
    """The length itself if the cache holds it; a shorter one only if the user named none."""
    tokens = (blocks - 1) * config.block_size
    if tokens >= length:
        return length
    if config.max_model_len is None and tokens >= config.block_size:
        logger.warning("max_model_len is %d, not %d: the KV cache holds no more", tokens, length)
        return tokens
    raise OutOfMemoryError(
        f"The KV cache holds {tokens} tokens, fewer than max_model_len ({length}). Set "
        f"--max-model-len {tokens} or lower, or give the cache more memory "
        "(--kv-cache-memory-bytes, --gpu-memory-utilization)."
    )
