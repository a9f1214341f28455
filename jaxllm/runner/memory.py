"""How many KV-cache blocks fit, decided before anything is compiled."""

import jax
import psutil

from jaxllm.attention.kv_cache import bytes_per_block
from jaxllm.config.engine import EngineConfig
from jaxllm.config.model import ModelConfig
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.params import ModelDef
from jaxllm.sampling.logprobs import PROMPT_CHUNK

GIB = 2**30
CPU_CACHE_BYTES = GIB


def weight_bytes(model: ModelDef) -> int:
    return sum(spec.size * spec.dtype.itemsize for spec in model.specs)


def scratch_bytes(config: ModelConfig, num_tokens: int, num_rows: int, itemsize: int) -> int:
    """Upper estimate of a step's temporaries: activations of one layer, and logits with their
    copies (of the sampled rows, or of the prompt positions that are scored at once).
    """
    widths = 4 * config.hidden_size + 3 * config.intermediate_size
    widths += 4 * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    logits = max(8 * num_rows, 3 * PROMPT_CHUNK) * config.vocab_size
    return num_tokens * widths * max(itemsize, 4) + logits * 4


def row_buffer_bytes(config: ModelConfig, num_rows: int, row_width: int) -> int:
    return (num_rows + 1) * (3 * config.vocab_size + 4 * row_width)


def num_blocks(
    config: EngineConfig, model: ModelConfig, dtype: str, *, other_bytes: int, wanted: int
) -> int:
    """Blocks of the KV cache. ``other_bytes``: weights, row buffers and scratch; ``wanted``:
    blocks that would let every row grow to max_model_len.

    Raises:
        OutOfMemoryError: there is no room for the null block and one more, or less memory than
            was asked for.
    """
    per_block = bytes_per_block(model, config.block_size, dtype)
    free = _free_bytes(other_bytes)
    if config.num_gpu_blocks_override is not None:
        blocks = config.num_gpu_blocks_override
    else:
        budget = config.kv_cache_memory_bytes
        blocks = min(wanted, (_default_budget(free) if budget is None else budget) // per_block)
    needed = max(blocks, 2) * per_block
    if blocks < 2 or (free is not None and needed > free):
        room = "an unknown amount" if free is None else f"{max(free, 0) / GIB:.2f} GiB"
        raise OutOfMemoryError(
            f"The model needs {other_bytes / GIB:.2f} GiB for weights and working memory, which "
            f"leaves {room} for a KV cache of {max(blocks, 2)} blocks or {needed / GIB:.2f} GiB. "
            "Use a smaller model, --max-num-seqs, --max-num-batched-tokens or --block-size, or "
            "change the memory you allow (--gpu-memory-utilization, --kv-cache-memory-bytes, "
            "--num-gpu-blocks-override: at least 2 blocks, and no more than is free)."
        )
    return blocks


def _free_bytes(other_bytes: int) -> int | None:
    """Memory for the cache beside everything else, negative if that alone is too much; None where
    the device does not tell.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return psutil.virtual_memory().available - other_bytes
    # The allocator's pool is already --gpu-memory-utilization of the card.
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit) - other_bytes


def _default_budget(free: int | None) -> int:
    """All of an accelerator's free memory; on a CPU, which others use too, a modest share."""
    if free is None:
        raise ConfigError("This device does not tell its memory: set --kv-cache-memory-bytes.")
    return min(free // 2, CPU_CACHE_BYTES) if jax.default_backend() == "cpu" else free
