"""Compiled programs by bucket: all that the serving path runs (a ``jax.jit`` inside a model or a
kernel is part of them).

All are compiled ahead of time from abstract shapes; a call can only reach an existing executable,
so nothing compiles after warm-up.
"""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxllm.attention.backend import AttentionBackend
from jaxllm.attention.kv_cache import kv_cache_spec
from jaxllm.attention.layers import layer_classes
from jaxllm.attention.variants import functions_of, row_params, token_params
from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.errors import RecompilationError
from jaxllm.models import get_model
from jaxllm.models.params import ModelDef
from jaxllm.runner.block_moves import (
    abstract_blocks,
    abstract_ids,
    copy_blocks,
    load_blocks,
    save_blocks,
)
from jaxllm.runner.lowering_cache import LoweringCache, is_ours
from jaxllm.runner.memory import MEASURED, ProgramMemory, WorkingMemory
from jaxllm.runner.row_layout import RowLayout, row_buffers_spec
from jaxllm.runner.step import (
    StepProgram,
    abstract_packed,
    abstract_recount,
    embed,
    forward,
    recount,
    sample,
    score,
    step_slots,
)
from jaxllm.runner.tapped_step import TapSizes, edits_spec, reads_spec, set_edits, tapped_forward
from jaxllm.sampling.metadata import SamplerMode
from jaxllm.sampling.token_mask import mask_words

logger = logging.getLogger(__name__)


MOST_ROWS_OF_XLA_GEMM = 8


@dataclass(frozen=True)
class _Job:
    key: "_Key"
    function: Callable[..., Any]
    args: tuple[Any, ...]  # abstract
    donated: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(map(str, self.key))


# What a program is compiled for: forward, tapped, sample, score or embed, and its bucket, or its
# rows and mode; the others are the same for all.
_Key = tuple[str] | tuple[str, BatchBucket] | tuple[str, int, SamplerMode]
_SHAPED_BY_BLOCKS = ("forward", "tapped", "copy", "save", "load")

_FULL_ROWS = 64


class Programs:
    """Executables: ``forward(bucket)``, ``sample(num_rows, mode)``, ``score(bucket)``."""

    def __init__(
        self,
        plan: EnginePlan,
        model: ModelDef,
        backend: AttentionBackend,
        lowerings: Path | None = None,
    ):
        """``lowerings``: a directory for what would have to be traced and lowered again."""
        self.plan = plan
        self.model = model
        self.backend = backend
        kept = (row_params(plan.model), token_params(plan.model))
        self.rows = RowLayout(plan.max_blocks_per_row, *kept)
        self.sampling_platform = kernel_platform()
        # A model or backend from elsewhere may change without the cache's key knowing of it.
        layers = layer_classes(plan.model)
        kept = is_ours(type(backend), get_model(plan.model.architecture), *layers)
        kept = kept and is_ours(*functions_of(plan.model))
        self._lowerings = lowerings if kept else None
        self._compiled: dict[_Key, Any] = {}
        self.compile_seconds = 0.0

    def forward(self, bucket: BatchBucket) -> Any:
        """Raises RecompilationError for a bucket that was not compiled."""
        return self._find(("forward", bucket))

    def sample(self, num_rows: int, mode: SamplerMode) -> Any:
        """FULL only for ``full_rows``."""
        return self._find(("sample", num_rows, mode))

    @property
    def full_rows(self) -> tuple[int, ...]:
        counts = {bucket.num_rows for bucket in self.plan.buckets}
        return full_rows(counts, self.sampling_platform)

    def modes(self, num_rows: int) -> tuple[SamplerMode, ...]:
        """Those that there is a sampler for."""
        full = num_rows in self.full_rows
        return tuple(mode for mode in SamplerMode if full or mode is not SamplerMode.FULL)

    def score(self, bucket: BatchBucket) -> Any:
        """Mixed buckets only."""
        return self._find(("score", bucket))

    def embed(self, bucket: BatchBucket) -> Any:
        """Mixed buckets only, and only where the plan has embeddings."""
        return self._find(("embed", bucket))

    def tapped(self, bucket: BatchBucket) -> Any:
        """``forward`` with taps. Mixed buckets only, and only where the plan has taps."""
        return self._find(("tapped", bucket))

    @property
    def edit(self) -> Any:
        """Of what rows change. Only where the plan has taps."""
        return self._find(("edit",))

    def move(self, kind: str) -> Any:
        """Of blocks: "copy", and where the plan has blocks on the host "save" and "load"."""
        return self._find((kind,))

    @property
    def recount(self) -> Any:
        return self._find(("recount",))

    def _find(self, key: _Key) -> Any:
        try:
            return self._compiled[key]
        except KeyError:
            known = ", ".join(str(bucket) for bucket in self.plan.buckets)
            raise RecompilationError(
                f"No program was compiled for {' '.join(map(str, key))}; buckets: {known}."
            ) from None

    def __len__(self) -> int:
        return len(self._compiled)

    def measure(self, *, threads: int = 4) -> WorkingMemory:
        """What the programs take, found before it is known how many KV blocks fit. The number of
        blocks shapes few programs, and not their temporaries: so the largest of each kind
        is compiled for the plan's number, whatever that is, and all the others for good.
        """
        largest = {bucket.kind: bucket for bucket in sorted(self.plan.buckets)}
        probes = [self._forward_job(bucket) for bucket in largest.values()]
        if self.plan.taps:
            probes.append(self._tapped_job(largest[BatchKind.MIXED]))
        self._compile([*probes, *self._move_jobs(), *self._fixed_jobs()], threads, progress=False)
        return self.working_memory()

    def settle(self, plan: EnginePlan) -> None:
        """Take the plan that knows how many blocks fit. Its tables stay as wide as before, even
        where it holds no row of that length.
        """
        if plan.num_blocks != self.plan.num_blocks:
            self._compiled = {
                key: found
                for key, found in self._compiled.items()
                if key[0] not in _SHAPED_BY_BLOCKS
            }
        self.plan = plan

    def compile(self, *, threads: int = 4, progress: bool = True) -> None:
        """Compile everything the plan's buckets need and that is not there yet, in parallel."""
        jobs = [self._forward_job(bucket) for bucket in self.plan.buckets]
        if self.plan.taps:
            jobs += [self._tapped_job(b) for b in self.plan.buckets if b.kind is BatchKind.MIXED]
        jobs += [*self._move_jobs(), *self._fixed_jobs()]
        missing = [job for job in jobs if job.key not in self._compiled]
        self._compile(missing, threads, progress=progress)
        logger.info("%d programs ready in %.1f s", len(self), self.compile_seconds)

    def working_memory(self) -> WorkingMemory:
        """Of every program there is, those with the largest temporaries first."""
        found = [_memory_of(key, program) for key, program in self._compiled.items()]
        found.sort(key=lambda program: program.temporary_bytes, reverse=True)
        return WorkingMemory(tuple(found), MEASURED)

    def _fixed_jobs(self) -> list[_Job]:
        """Those that the number of KV blocks does not shape."""
        by_rows = {bucket.num_rows: bucket for bucket in self.plan.buckets}
        mixed = [bucket for bucket in self.plan.buckets if bucket.kind is BatchKind.MIXED]
        jobs = [
            self._sample_job(bucket, mode)
            for bucket in by_rows.values()
            for mode in self.modes(bucket.num_rows)
        ]
        jobs += [self._score_job(bucket) for bucket in mixed]
        jobs += [_Job(("recount",), recount, (self._row_buffers(), abstract_recount()), (0,))]
        if self.plan.taps:
            jobs.append(self._edit_job())
        return jobs + [self._embed_job(b) for b in mixed if self.plan.embeddings]

    def _compile(self, jobs: list[_Job], threads: int, *, progress: bool) -> None:
        started = time.monotonic()
        shaped_by = (_without_host_settings(self.plan), self.backend.name, self.model.names)
        cache = LoweringCache(self._lowerings, *shaped_by)

        def lower(job: _Job) -> jax.stages.Lowered:
            return cache.lower(job.name, job.function, job.args, job.donated)

        # Tracing is Python and gains nothing from threads; XLA releases the GIL while it compiles.
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(lower(job).compile, _compiler_options(job.key)) for job in jobs]
            bar = tqdm(
                zip(jobs, futures, strict=True),
                total=len(jobs),
                desc="Compiling",
                unit="program",
                disable=None if progress else True,
            )
            for job, future in bar:
                self._compiled[job.key] = future.result()
        self.compile_seconds += time.monotonic() - started

    def step_program(self, bucket: BatchBucket) -> StepProgram:
        return StepProgram(self.model, self.backend, self.rows, bucket, self.plan.block_size)

    def _forward_args(self, bucket: BatchBucket) -> tuple[Any, ...]:
        packed = abstract_packed(self.step_program(bucket))
        return self.model.specs, self._kv(), self._row_buffers(), packed

    def _kv(self) -> Any:
        plan = self.plan
        return kv_cache_spec(
            plan.model, plan.num_blocks, plan.block_size, plan.page_dtype, plan.cache_head_dims
        )

    def _row_buffers(self) -> Any:
        return row_buffers_spec(self.rows, self.plan.max_num_seqs, self.plan.model.vocab_size)

    def _move_jobs(self) -> list[_Job]:
        kv, ids = self._kv(), abstract_ids()
        jobs = [_Job(("copy",), copy_blocks, (kv, abstract_ids(2)), donated=(0,))]
        if self.plan.host_blocks:
            jobs.append(_Job(("save",), save_blocks, (kv, ids)))
            jobs.append(_Job(("load",), load_blocks, (kv, ids, abstract_blocks(kv)), donated=(0,)))
        return jobs

    def _forward_job(self, bucket: BatchBucket) -> _Job:
        function = partial(forward, program=self.step_program(bucket))
        return _Job(("forward", bucket), function, self._forward_args(bucket), donated=(1, 2))

    def _tapped_job(self, bucket: BatchBucket) -> _Job:
        sizes = TapSizes.of(self.plan, self.rows.max_blocks)
        function = partial(tapped_forward, program=self.step_program(bucket), sizes=sizes)
        reads = reads_spec(self.plan.model.num_layers, sizes)
        args = (*self._forward_args(bucket), edits_spec(self.plan), reads)
        return _Job(("tapped", bucket), function, args, donated=(1, 2))

    def _edit_job(self) -> _Job:
        edits = edits_spec(self.plan)
        one = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype), edits)
        row = jax.ShapeDtypeStruct((), jnp.int32)
        return _Job(("edit",), set_edits, (edits, row, one), donated=(0,))

    def _score_job(self, bucket: BatchBucket) -> _Job:
        program = self.step_program(bucket)
        args = (self.model.specs, self._hidden(bucket), abstract_packed(program))
        return _Job(("score", bucket), partial(score, program=program), args)

    def _embed_job(self, bucket: BatchBucket) -> _Job:
        program = self.step_program(bucket)
        args = (self._hidden(bucket), abstract_packed(program))
        return _Job(("embed", bucket), partial(embed, program=program), args)

    def _hidden(self, bucket: BatchBucket) -> jax.ShapeDtypeStruct:
        shape = (bucket.num_tokens, self.plan.model.hidden_size)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.plan.dtype))

    def _sample_job(self, bucket: BatchBucket, mode: SamplerMode) -> _Job:
        """Its inputs are the same for all buckets with that many rows."""
        count, vocab = bucket.num_rows, self.plan.model.vocab_size
        rows = self._row_buffers()
        logits = jax.ShapeDtypeStruct((count, vocab), jnp.float32)
        slots = jax.eval_shape(
            lambda packed: step_slots(self.step_program(bucket).layout.views(packed)),
            abstract_packed(self.step_program(bucket)),
        )
        mask = jax.ShapeDtypeStruct((count, mask_words(vocab)), jnp.int32)
        platform = self.sampling_platform
        function = partial(sample, layout=self.rows, mode=mode, platform=platform)
        return _Job(("sample", count, mode), function, (rows, logits, slots, mask), donated=(0,))


def full_rows(counts: Iterable[int], platform: str) -> tuple[int, ...]:
    """Of the numbers of rows that there are, those whose FULL sampler is compiled; a step of fewer
    rows takes the next larger bucket. On a GPU that costs nothing below 64 rows, since reading the
    weights takes the time.
    """
    counts = sorted(counts)
    least = 1 if platform == "cpu" else min(_FULL_ROWS, counts[-1])
    return tuple(count for count in counts if count >= least)


def _without_host_settings(plan: EnginePlan) -> EnginePlan:
    """What programs depend on. An engine that shares prefixes or swaps runs those of one that does
    not; what ends an answer comes with the request; the number of blocks is seen in the arguments
    of those that it shapes.
    """
    return replace(
        plan,
        model=replace(plan.model, eos_token_ids=(), bos_token_id=None),
        num_blocks=0,
        prefix_caching=True,
        prefix_cache_scope="key",
        host_blocks=0,
        offloading=False,
    )


def kernel_platform() -> str:
    """The device that programs are compiled for, as pallas_kernels names it."""
    device: Any = jax.devices()[0]
    hopper = str(getattr(device, "compute_capability", "")) == "9.0"
    return "sm_90" if hopper else str(device.platform)


def _memory_of(key: _Key, program: Any) -> ProgramMemory:
    stats = program.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    if key[0] == "load":  # what comes from the host has nowhere else to be counted
        outputs += stats.argument_size_in_bytes - stats.alias_size_in_bytes
    shape = " ".join(map(str, key[1:]))
    return ProgramMemory(key[0], shape, stats.temp_size_in_bytes, outputs)


def _compiler_options(key: _Key) -> dict[str, bool]:
    """On a GPU, XLA reads a slice in place by handing its address on, which fails at run time when
    that is not aligned: a gather of one row from an array of bytes is enough.

    For products of few rows XLA's own kernels are the fastest, for others the vendor's library is;
    left to choose, XLA takes its own too often (figures in NOTES.md).
    """
    if jax.default_backend() != "gpu":
        return {}
    options = {"xla_gpu_enable_dynamic_slice_fusion": False}
    buckets = [part for part in key if isinstance(part, BatchBucket)]
    if any(bucket.num_tokens > MOST_ROWS_OF_XLA_GEMM for bucket in buckets):
        options |= {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_cublaslt": True}
    return options
