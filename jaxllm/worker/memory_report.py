"""What an engine would hold on a device, found without loading weights or allocating a cache.

Every figure comes from the functions that the engine itself is built with. Imports JAX.
"""

from dataclasses import replace
from typing import Any

import jax

from jaxllm.attention.kv_cache import most_padded
from jaxllm.attention.select import cache_head_dims
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import EnginePlan
from jaxllm.runner.memory import (
    MEASURED,
    Device,
    MemoryPlan,
    estimated_memory,
    memory_plan,
    this_device,
)
from jaxllm.runner.planning import draft_plan, fit_plan
from jaxllm.worker.wiring import (
    OpenedModel,
    compile_programs,
    configure_jax,
    draft_programs,
    open_model,
    size_programs,
)

LENGTHS = (1024, 4096, 8192)  # of requests, beside max_model_len
SAME_CARD = 0.1  # what a card is sold as and what its driver counts differ by less


def memory_report(config: EngineConfig, gpu_memory: int | None = None) -> dict[str, Any]:
    """Plan for the device of this machine, or for a GPU of ``gpu_memory`` bytes. If the GPU here is
    about that large it is the one that is meant, and what its driver says counts.

    On a GPU that is here all programs are compiled, which the engine then finds in its cache, and
    asked what they need. Elsewhere that is estimated. Sizes are in bytes.

    Raises:
        ConfigError: and its subclasses, as for an engine that cannot start.
    """
    configure_jax(config, preallocate=False)
    opened = open_model(config)
    device = this_device(config.tensor_parallel_size)
    kind = str(jax.devices()[0].device_kind)
    if gpu_memory is not None and not _is_here(device, gpu_memory, config):
        device = Device("gpu", int(gpu_memory * config.gpu_memory_utilization))
        attention = ("unknown", "chosen on the card")
        draft = draft_plan(
            config,
            opened.model,
            opened.dtype,
            device.platform,
            attention,
            cache_head_dims=cache_head_dims(opened.model.config),
        )
        memory = memory_plan(draft, opened.model, device, estimated_memory(draft))
        return _report(
            opened, f"a GPU of {gpu_memory / 1e9:.1f} GB", fit_plan(config, draft, memory), memory
        )
    programs = draft_programs(config, opened, device)
    if device.platform == "cpu":
        draft = programs.plan
        memory = memory_plan(draft, opened.model, device, estimated_memory(draft))
        return _report(opened, kind, fit_plan(config, draft, memory), memory)
    memory = size_programs(config, programs, device)
    compile_programs(programs, memory)
    found = replace(memory, working=programs.working_memory())
    return _report(opened, kind, programs.plan, found)


def _is_here(device: Device, gpu_memory: int, config: EngineConfig) -> bool:
    if device.platform == "cpu" or device.limit is None:
        return False
    whole = device.limit / config.gpu_memory_utilization
    return abs(whole - gpu_memory) < SAME_CARD * gpu_memory


def _report(opened: OpenedModel, kind: str, plan: EnginePlan, memory: MemoryPlan) -> dict[str, Any]:
    working, free = memory.working, memory.free
    cache = plan.num_blocks * memory.block
    lengths = sorted({plan.max_model_len, *(n for n in LENGTHS if n < plan.max_model_len)})
    head_dim, stored = most_padded(plan.model, plan.cache_head_dims)
    source = f"{MEASURED} on {kind}" if working.source == MEASURED else working.source
    return {
        "model": opened.files.name,
        "dtype": plan.dtype,
        "kv_cache_dtype": plan.page_dtype,
        "device": kind,
        "devices": plan.model.shards,
        "platform": memory.device.platform,
        "attention": plan.attention_reason,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": plan.max_num_batched_tokens,
        "limit_bytes": memory.device.limit,
        "weight_bytes": memory.weights,
        "row_buffer_bytes": memory.rows,
        "temporary_bytes": working.worst.temporary_bytes,
        "temporaries": source,
        "output_bytes": working.output_bytes,
        "reserve_bytes": memory.device.reserve,
        "kv_cache_bytes": cache,
        "unused_bytes": None if free is None else free - cache,
        "head_dim": head_dim,
        "cache_head_dim": stored,
        "block_size": plan.block_size,
        "kv_block_bytes": memory.block,
        "kv_blocks": plan.num_blocks,
        "kv_tokens": plan.kv_tokens,
        "concurrency": [
            {"tokens": tokens, "requests": round(plan.max_concurrency(tokens), 2)}
            for tokens in lengths
        ],
        "programs": [
            {
                "program": program.name,
                "temporary_bytes": program.temporary_bytes,
                "output_bytes": program.output_bytes,
            }
            for program in sorted(working.programs, key=lambda p: -p.temporary_bytes)
        ],
    }
