"""What an engine holds on its device, and how many KV-cache blocks fit beside it.

The temporaries and outputs of programs are read from the compiled ones where that is worth it,
and otherwise estimated from shapes, never below the truth.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import psutil

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.kv_cache import bytes_per_block
from jaxllm.attention.variants import row_params
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.params import ModelDef
from jaxllm.runner.block_moves import BLOCKS_PER_MOVE
from jaxllm.runner.host_pool import MOVES_ALIVE
from jaxllm.runner.row_layout import RowLayout, row_buffers_spec
from jaxllm.runner.step import TOKENS_PER_RECOUNT, HiddenShape
from jaxllm.runner.tapped_step import TapSizes, edits_spec
from jaxllm.sampling.logprobs import PROMPT_CHUNK
from jaxllm.sampling.metadata import SamplerMode
from jaxllm.sampling.token_mask import mask_words
from jaxllm.sampling_params import MAX_LOGPROBS

GIB = 2**30
MIB = 2**20
CPU_CACHE_BYTES = GIB
# XLA's allocator on GPUs hands out a free chunk whole when less than 128 MiB of it would be left
# over. As much again is for the holes between outputs that live for different times, and for what
# is not counted: step buffers, masks on their way, logits of numbers of rows that do not double,
# alignment to 256 bytes. CUDA graphs, kernels and library handles lie outside the allocator's pool,
# in the share that the engine leaves free.
GPU_RESERVE_BYTES = 2 * 128 * MIB
STEPS_ALIVE = 2  # the one whose results are fetched, and the one dispatched ahead of it
# In estimates: the workspace of a matrix product on Hopper, and room for whatever is small.
WORKSPACE_BYTES = 32 * MIB
SPLIT_TOKENS = 2048  # decode attention may keep a partial result for so many tokens of a row
MEASURED, ESTIMATED = "measured", "estimate (upper bound)"


@dataclass(frozen=True, slots=True)
class Device:
    """``limit``: bytes that the engine may hold there, None where the device does not tell."""

    platform: str  # "cpu", or "gpu" for every accelerator
    limit: int | None

    @property
    def reserve(self) -> int:
        return 0 if self.platform == "cpu" else GPU_RESERVE_BYTES


@dataclass(frozen=True, slots=True)
class ProgramMemory:
    """Bytes that a program takes beside its arguments. Updated arguments are no outputs."""

    kind: str  # forward, tapped, sample, score, embed
    shape: str
    temporary_bytes: int
    output_bytes: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.shape}".rstrip()


@dataclass(frozen=True, slots=True)
class WorkingMemory:
    """What steps need beside what always stays. Programs run one after the other, so that only
    the largest temporaries count; outputs live on until they are fetched or replaced.
    """

    programs: tuple[ProgramMemory, ...]
    source: str  # MEASURED or ESTIMATED

    @property
    def worst(self) -> ProgramMemory:
        return max(self.programs, key=lambda program: program.temporary_bytes)

    @property
    def output_bytes(self) -> int:
        """Of all steps that can be alive, each running the largest program of every kind; blocks on
        their way to the host outlive the steps that saved them. Logits are kept to be written over,
        one step's of every number of rows (``spares.py``): numbers double, so that all of them
        together are hardly more than two steps' of the largest.
        """
        largest: dict[str, int] = {}
        for program in self.programs:
            largest[program.kind] = max(largest.get(program.kind, 0), program.output_bytes)
        alive = {"save": MOVES_ALIVE}
        return sum(alive.get(kind, STEPS_ALIVE) * size for kind, size in largest.items())

    @property
    def total(self) -> int:
        return self.worst.temporary_bytes + self.output_bytes if self.programs else 0


NO_WORK = WorkingMemory((), MEASURED)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of everything that an engine of one plan holds on its device."""

    device: Device
    weights: int
    rows: int  # row buffers, and the masks that allow every token
    working: WorkingMemory
    block: int  # one block of the KV cache, over all layers

    @property
    def beside_cache(self) -> int:
        return self.weights + self.rows + self.working.total + self.device.reserve

    @property
    def free(self) -> int | None:
        """What is left for the cache: negative if even the rest is too much."""
        return None if self.device.limit is None else self.device.limit - self.beside_cache


def memory_plan(
    plan: EnginePlan, model: ModelDef, device: Device, working: WorkingMemory
) -> MemoryPlan:
    """``num_blocks`` of ``plan`` does not matter; its max_model_len must be the one that programs
    are compiled for."""
    block = bytes_per_block(plan.model, plan.block_size, plan.page_dtype, plan.cache_head_dims)
    return MemoryPlan(device, _bytes(model.specs), row_bytes(plan), working, block)


def row_bytes(plan: EnginePlan) -> int:
    """Row buffers, what rows change, and one mask of full rows for every number of rows."""
    layout = RowLayout(plan.max_blocks_per_row, row_params(plan.model))
    buffers = row_buffers_spec(layout, plan.max_num_seqs, plan.model.vocab_size)
    masked = sum({bucket.num_rows for bucket in plan.buckets})
    edits = _bytes(jax.tree.leaves(edits_spec(plan))) if plan.taps else 0
    return _bytes(jax.tree.leaves(buffers)) + edits + masked * mask_words(plan.model.vocab_size) * 4


def estimated_memory(plan: EnginePlan) -> WorkingMemory:
    """Upper estimates from shapes alone: float32 activations of one layer, several copies of
    whatever is as wide as the vocabulary, and the partial results of a long row's attention.
    Of the samplers only the largest.
    """
    model = plan.model
    itemsize = jnp.dtype(plan.dtype).itemsize
    widths = 4 * model.hidden_size + 3 * model.widest_block
    specs = [AttentionSpec.of(model, layer) for layer in range(model.num_layers)]
    dims = plan.cache_head_dims or [spec.head_dim for spec in specs]
    sized = list(zip(specs, dims, strict=True))
    widths += 4 * max((s.num_heads + 2 * s.num_kv_heads) * dim for s, dim in sized)
    splits = -(-plan.max_model_len // SPLIT_TOKENS)
    row = splits * max(s.num_heads * (dim + 1) for s, dim in sized) * 4
    row += 8 * plan.max_blocks_per_row
    logits, scores = model.vocab_size * 4, MAX_LOGPROBS * 8 + 16
    hidden = HiddenShape.of(plan.buckets)
    programs: list[ProgramMemory] = []
    for bucket in plan.buckets:
        tokens, rows = bucket.num_tokens, bucket.num_rows
        inside = tokens * widths * max(itemsize, 4) + rows * (2 * logits + row) + WORKSPACE_BYTES
        left = hidden.tokens if bucket.kind is BatchKind.MIXED else tokens
        outputs = rows * (logits + 16) + left * model.hidden_size * itemsize
        programs.append(ProgramMemory("forward", str(bucket), inside, outputs))
        if bucket.kind is BatchKind.MIXED and plan.taps:
            programs.append(_tapped(plan, bucket, inside, outputs))
    if hidden.tokens:
        inside = 3 * PROMPT_CHUNK * logits + hidden.scored * (4 * model.hidden_size + 2 * scores)
        inside += WORKSPACE_BYTES
        programs.append(ProgramMemory("score", "", inside, hidden.tokens * scores))
    rows = max(bucket.num_rows for bucket in plan.buckets)
    inside = rows * (8 * logits + 2 * scores) + WORKSPACE_BYTES
    programs.append(ProgramMemory("sample", f"{rows} {SamplerMode.FULL}", inside, rows * scores))
    block = bytes_per_block(model, plan.block_size, plan.page_dtype, plan.cache_head_dims)
    moved = (BLOCKS_PER_MOVE + 1) * block
    programs.append(ProgramMemory("copy", "", moved + WORKSPACE_BYTES, 0))
    if plan.host_blocks:
        programs.append(ProgramMemory("save", "", moved + WORKSPACE_BYTES, moved))
        programs.append(ProgramMemory("load", "", 2 * moved + WORKSPACE_BYTES, moved))
    programs.append(ProgramMemory("recount", "", 64 * TOKENS_PER_RECOUNT + WORKSPACE_BYTES, 0))
    return WorkingMemory(tuple(programs), ESTIMATED)


def _tapped(plan: EnginePlan, bucket: BatchBucket, inside: int, outputs: int) -> ProgramMemory:
    """Beside what ``forward`` takes: float32 copies of the residual stream and of vectors to be
    added to it, what is read and how it was before, and one row's keys for probabilities.
    """
    model, sizes = plan.model, TapSizes.of(plan, plan.max_blocks_per_row)
    read = sizes.num_bytes(plan)
    keys = sizes.keys * (2 * model.num_heads * model.head_dim + 8 * model.num_heads) * 4
    states = 4 * bucket.num_tokens * model.hidden_size * 4
    return ProgramMemory("tapped", str(bucket), inside + states + 2 * read + keys, outputs + read)


def this_device(shards: int = 1) -> Device:
    """Each of the first ``shards`` devices: what the smallest of them has. Raises nothing: one that
    does not tell its memory has no limit.
    """
    devices = jax.devices()[:shards]
    if devices[0].platform == "cpu":
        return Device("cpu", psutil.virtual_memory().available // shards)
    # The allocator's pool is already --gpu-memory-utilization of the card.
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return Device("gpu", min((int(limit) for limit in limits if limit is not None), default=None))


def num_blocks(config: EngineConfig, memory: MemoryPlan, wanted: int) -> int:
    """Blocks of the KV cache. ``wanted``: as many as would let every row grow to max_model_len.

    Raises:
        OutOfMemoryError: there is no room for the null block and one more, or less memory than
            was asked for.
        ConfigError: the device does not tell its memory, and no size was asked for.
    """
    free = memory.free
    if config.num_gpu_blocks_override is not None:
        blocks = config.num_gpu_blocks_override
    else:
        budget = config.kv_cache_memory_bytes
        blocks = min(
            wanted, (_default_budget(memory) if budget is None else budget) // memory.block
        )
    needed = max(blocks, 2) * memory.block
    if blocks < 2 or (free is not None and needed > free):
        room = "an unknown amount" if free is None else f"{max(free, 0) / GIB:.2f} GiB"
        raise OutOfMemoryError(
            f"The model needs {memory.beside_cache / GIB:.2f} GiB for weights and working memory, "
            f"which leaves {room} for a KV cache of {max(blocks, 2)} blocks or "
            f"{needed / GIB:.2f} GiB. Use a smaller model, --max-num-seqs, "
            "--max-num-batched-tokens or --block-size, or change the memory you allow "
            "(--gpu-memory-utilization, --kv-cache-memory-bytes, --num-gpu-blocks-override: at "
            "least 2 blocks, and no more than is free)."
        )
    return blocks


def _default_budget(memory: MemoryPlan) -> int:
    """All of an accelerator's free memory; on a CPU, which others use too, a modest share."""
    if memory.free is None:
        raise ConfigError("This device does not tell its memory: set --kv-cache-memory-bytes.")
    return (
        min(memory.free // 2, CPU_CACHE_BYTES) if memory.device.platform == "cpu" else memory.free
    )


def _bytes(specs: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(spec.size * spec.dtype.itemsize for spec in specs)
