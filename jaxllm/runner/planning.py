"""Decides shapes and sizes: an EnginePlan from what was asked, what the model is, and the device.

In two parts, because the number of KV blocks depends on what the programs need: ``draft_plan``
decides everything else, and ``fit_plan`` completes it.
"""

from dataclasses import replace
from pathlib import Path

import psutil

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.kv_cache import bytes_per_block
from jaxllm.attention.variants import request_params
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan, make_buckets, page_dtype
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.params import ModelDef
from jaxllm.runner.memory import (
    GIB,
    NO_WORK,
    Device,
    MemoryPlan,
    WorkingMemory,
    estimated_memory,
    memory_plan,
    num_blocks,
)
from jaxllm.runner.row_layout import MAX_EOS_IDS, RowLayout

# (max_num_seqs, max_num_batched_tokens) where the user named none.
_DEFAULTS = {"cpu": (16, 256), "gpu": (256, 8192)}
_MIXED_LADDER = {"cpu": (64, 128, 256, 512), "gpu": (256, 512, 1024, 2048, 4096, 8192, 16384)}
_SMALL_MIXED = 128  # tokens
_ROW_LADDER = {"cpu": (2, 8, 32, 128), "gpu": (1, 8, 64, 128, 256, 512)}
# What programs are compiled for before the number is known: of the size of real caches, so that
# XLA treats the cache as it will. Nothing of that size is allocated.
_LIKELY_BLOCKS = 4096
# Whether loading a block is faster than computing it, and what is then set aside.
_SWAP_GIB, _SWAP_SHARE = 4.0, 1 / 16  # no more than that share of the host's memory
_STAGING_GIB = 1.0  # through which blocks go to files and back, where nothing else was asked for
# On an H200 with Llama 3.1 8B 1 GB, 8,192 tokens, goes to the host and back in 46 ms, computing it
# again takes 208 (parts `swapping` and `prefix-urgent` of scripts/bench/h200).
_LINK_BYTES_PER_S = 2.2e10
_FLOPS = 600e12
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def draft_plan(
    config: EngineConfig,
    model: ModelDef,
    dtype: str,
    platform: str,
    attention: tuple[str, str],
    cache_head_dims: tuple[int, ...] = (),
) -> EnginePlan:
    """All but what depends on memory: its number of blocks is only a likely one.

    ``attention``: the backend's name, and the reason for it. ``cache_head_dims``: as in the plan.
    Raises ConfigError for what cannot work.
    """
    max_num_seqs = config.max_num_seqs or _DEFAULTS[platform][0]
    max_tokens = config.max_num_batched_tokens or max(_DEFAULTS[platform][1], max_num_seqs)
    if max_tokens < max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens ({max_tokens}) must be at least --max-num-seqs "
            f"({max_num_seqs}): every running request needs one token per step."
        )
    _check_eos_ids(model)
    if config.taps:
        _check_tapped_heads(model)
    max_model_len = _asked_length(config, model)
    _check_row_width(max_num_seqs, -(-max_model_len // config.block_size))
    rows = row_sizes(platform, max_num_seqs)
    return EnginePlan(
        model=model.config,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        block_size=config.block_size,
        num_blocks=_LIKELY_BLOCKS,
        buckets=_buckets(config, platform, rows, max_tokens),
        attention_backend=attention[0],
        attention_reason=attention[1],
        embeddings=config.enable_embeddings,
        taps=config.taps,
        prefix_caching=config.enable_prefix_caching,
        jump_forward=config.jump_forward,
        prefix_cache_scope=config.prefix_cache_scope,
        host_blocks=_host_blocks(config, model, platform, dtype, cache_head_dims),
        offloading=config.kv_offloading_size > 0,
        kv_files=config.kv_offloading_dir is not None,
        # All other rows may decode in the step that feeds a span whole.
        attention_params=request_params(model.config, max_tokens - max_num_seqs + 1),
        kv_cache_dtype=config.kv_cache_dtype,
        cache_head_dims=cache_head_dims,
    )


def fit_plan(config: EngineConfig, draft: EnginePlan, memory: MemoryPlan) -> EnginePlan:
    """The draft with as many blocks as fit, and a length they can hold.

    Raises:
        OutOfMemoryError: too little memory for any cache, or for the one that was asked for.
        ConfigError: the device does not tell its memory, and no size was asked for.
    """
    # As many as let every row grow to max_model_len, and the null block.
    most = draft.max_num_seqs * draft.max_blocks_per_row + 1
    blocks = num_blocks(config, memory, most)
    length = _fitting_length(config, draft.max_model_len, blocks)
    return replace(draft, num_blocks=blocks, max_model_len=length)


def needs_measuring(
    config: EngineConfig, draft: EnginePlan, model: ModelDef, device: Device
) -> bool:
    """Whether an estimate of the working memory would cost KV blocks. On a CPU, where the cache
    takes a modest share of memory by itself, it never does.

    Raises:
        OutOfMemoryError: there would be too little memory even if steps needed none.
        ConfigError: the device does not tell its memory, and no size was asked for.
    """
    most = fit_plan(config, draft, memory_plan(draft, model, device, NO_WORK)).num_blocks
    if device.platform == "cpu":
        return False
    estimate = memory_plan(draft, model, device, estimated_memory(draft))
    return estimate.free is not None and most * estimate.block > estimate.free


def check_plan(plan: EnginePlan, memory: MemoryPlan, found: WorkingMemory) -> None:
    """Compare what the plan was made for with the programs that were compiled for it.

    Raises:
        OutOfMemoryError: together they need more than there is; names the largest program.
    """
    real = replace(memory, working=found)
    if real.free is None or plan.num_blocks * real.block <= real.free:
        return
    blocks = max(real.free // real.block, 2)
    raise OutOfMemoryError(
        f"{found.worst.name} needs {found.worst.temporary_bytes / GIB:.3f} GiB of temporary memory "
        f"and all outputs {found.output_bytes / GIB:.3f} GiB, but only "
        f"{memory.working.total / GIB:.3f} GiB were set aside for both. Start with "
        f"--num-gpu-blocks-override {blocks}, or lower --max-num-batched-tokens or --max-num-seqs."
    )


def row_sizes(platform: str, max_num_seqs: int) -> tuple[int, ...]:
    """Rows of the decode buckets.

    On a CPU XLA converts every bf16 weight to float32 when there is only one row, which costs seven
    times as much as two rows: so the smallest is 2 there. On a GPU a step of 9 rows costs what one
    of 64 does, since reading the weights takes the time: so there are few.
    """
    least = 2 if platform == "cpu" else 1
    return (*(n for n in _ROW_LADDER[platform] if n < max_num_seqs), max(max_num_seqs, least))


def mixed_sizes(platform: str, num_rows: int, max_tokens: int) -> tuple[int, ...]:
    """Tokens of the mixed buckets; each holds a token of every row."""
    below = [size for size in _MIXED_LADDER[platform] if num_rows <= size < max_tokens]
    return (*below, max(max_tokens, num_rows))


def _buckets(
    config: EngineConfig, platform: str, rows: tuple[int, ...], max_tokens: int
) -> tuple[BatchBucket, ...]:
    """With ``--target-itl-ms`` a GPU gets a mixed bucket below those that hold every row: beside a
    few dozen decoding rows with long contexts all others may be late (figures in NOTES.md).
    """
    sizes = mixed_sizes(platform, rows[-1], max_tokens)
    buckets = make_buckets(rows, sizes, rows[-1])
    if config.target_itl_ms is None or platform == "cpu" or sizes[0] <= _SMALL_MIXED:
        return buckets
    few = max(count for count in rows if count <= _SMALL_MIXED)
    return (*buckets, BatchBucket(_SMALL_MIXED, few, BatchKind.MIXED))


def _host_blocks(
    config: EngineConfig, model: ModelDef, platform: str, dtype: str, head_dims: tuple[int, ...]
) -> int:
    """Slots for KV blocks in the host's memory. Left to itself, an engine on an accelerator has
    some where loading a block takes less time than computing it.

    Raises:
        OutOfMemoryError: more was asked for than the host has.
    """
    if not config.enable_prefix_caching:
        return 0
    pages = page_dtype(config.kv_cache_dtype, dtype)
    block = bytes_per_block(model.config, config.block_size, pages, head_dims)
    swap_space, there_is = config.swap_space, _host_gib()
    if swap_space is None:
        flops = 2 * config.block_size * sum(spec.size for spec in model.specs)
        pays = platform != "cpu" and block / _LINK_BYTES_PER_S < flops / _FLOPS
        swap_space = _SWAP_GIB if pays and there_is * _SWAP_SHARE >= _SWAP_GIB else 0.0
    if config.kv_offloading_dir is not None and not swap_space + config.kv_offloading_size:
        swap_space = _STAGING_GIB
    wanted = swap_space + config.kv_offloading_size
    if wanted > there_is:
        raise OutOfMemoryError(
            f"--swap-space and --kv-offloading-size are {wanted:g} GiB together, but this host has "
            f"{there_is:.1f} GiB of memory. Lower them."
        )
    return int(wanted * GIB) // (block * model.config.shards)


def _host_gib() -> float:
    """Memory that this process may use: the host's, or what its container is limited to."""
    try:
        limit = float(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # no container, or "max"
        limit = float("inf")
    return min(float(psutil.virtual_memory().total), limit) / GIB


def _check_eos_ids(model: ModelDef) -> None:
    ids, vocab_size = model.config.eos_token_ids, model.config.vocab_size
    if len(ids) > MAX_EOS_IDS or any(token_id >= vocab_size for token_id in ids):
        raise ConfigError(
            f"eos_token_id of config.json and generation_config.json must name at most "
            f"{MAX_EOS_IDS} ids below vocab_size ({vocab_size}), got {list(ids)}."
        )


def _check_tapped_heads(model: ModelDef) -> None:
    heads = {spec.num_heads for spec in AttentionSpec.all_of(model.config)}
    if heads != {model.config.num_heads}:
        raise ConfigError(
            f"--taps needs attention layers of {model.config.num_heads} query heads each, as "
            f"config.json says; this model's have {sorted(heads)}."
        )


def _check_row_width(max_num_seqs: int, blocks_per_row: int) -> None:
    """The step names a cell of all rows by one int32."""
    if (max_num_seqs + 1) * RowLayout(blocks_per_row).width >= 2**31:
        raise ConfigError(
            f"--max-num-seqs ({max_num_seqs}) times {blocks_per_row} KV-cache blocks per row are "
            "too many to count. Lower --max-num-seqs or --max-model-len, or raise --block-size."
        )


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
        return tokens
    raise OutOfMemoryError(
        f"The KV cache holds {tokens} tokens, fewer than max_model_len ({length}). Set "
        f"--max-model-len {tokens} or lower, or give the cache more memory "
        "(--kv-cache-memory-bytes, --gpu-memory-utilization)."
    )
