"""How many KV-cache blocks fit, decided before anything is compiled."""

import jax
import psutil

from jaxllm.attention.kv_cache import bytes_per_block
from jaxllm.config.engine import EngineConfig
from jaxllm.config.model import ModelConfig
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.params import ModelDef

GIB = 2**30
CPU_CACHE_BYTES = GIB


def weight_bytes(model: ModelDef) -> int:
    return sum(spec.size * spec.dtype.itemsize for spec in model.specs)


def scratch_bytes(config: ModelConfig, num_tokens: int, num_rows: int, itemsize: int) -> int:
    """Upper estimate of a step's temporaries: activations of one layer, logits and their copies."""
    widths = 4 * config.hidden_size + 3 * config.intermediate_size
    widths += 4 * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return num_tokens * widths * max(itemsize, 4) + 8 * num_rows * config.vocab_size * 4


def row_buffer_bytes(config: ModelConfig, num_rows: int, row_width: int) -> int:
    return (num_rows + 1) * (3 * config.vocab_size + 4 * row_width)


def num_blocks(
    config: EngineConfig, model: ModelConfig, dtype: str, *, other_bytes: int, wanted: int
) -> int:
    """Blocks of the KV cache. ``other_bytes``: weights, row buffers and scratch; ``wanted``:
    blocks that would let every row grow to max_model_len.

    Raises:
        OutOfMemoryError: not even one request of full length would fit.
    """
    per_block = bytes_per_block(model, config.block_size, dtype)
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = _cache_budget(other_bytes)
    blocks = min(wanted, budget // per_block)
    if blocks < 2:
        raise OutOfMemoryError(
            f"The model needs {other_bytes / GIB:.1f} GiB for weights and working memory and "
            f"leaves {max(budget, 0) / GIB:.2f} GiB for the KV cache. Use a smaller model, a "
            "smaller --max-num-seqs or --max-num-batched-tokens, or a higher "
            "--gpu-memory-utilization."
        )
    return int(blocks)


def _cache_budget(other_bytes: int) -> int:
    """Bytes left for the cache on the accelerator; on a CPU a modest share of the free memory."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        free = psutil.virtual_memory().available - other_bytes
        return int(min(free // 2, CPU_CACHE_BYTES))
    # The allocator's pool is already --gpu-memory-utilization of the card.
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ConfigError("This device does not tell its memory: set --kv-cache-memory-bytes.")
    return int(limit) - other_bytes
