"""Compiled programs by bucket: all that the serving path runs (a ``jax.jit`` inside a model or a
kernel is part of them).

All are compiled ahead of time from abstract shapes; a call can only reach an existing executable,
so nothing compiles after warm-up.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxllm.attention.backend import AttentionBackend
from jaxllm.attention.kv_cache import kv_cache_spec
from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.errors import RecompilationError
from jaxllm.models.params import ModelDef
from jaxllm.runner.row_layout import RowLayout, row_buffers_spec
from jaxllm.runner.step import StepProgram, abstract_packed, forward, sample, score, step_slots
from jaxllm.sampling.metadata import SamplerMode
from jaxllm.sampling.token_mask import mask_words

logger = logging.getLogger(__name__)


MOST_ROWS_OF_XLA_GEMM = 8


@dataclass(frozen=True)
class _Job:
    key: "_Key"
    lower: Callable[[], Any]


# What a program is compiled for: forward, sample or score, and its bucket, or its rows and mode.
_Key = tuple[str, BatchBucket] | tuple[str, int, SamplerMode]


class Programs:
    """Executables: ``forward(bucket)``, ``sample(num_rows, mode)``, ``score(bucket)``."""

    def __init__(self, plan: EnginePlan, model: ModelDef, backend: AttentionBackend):
        self.plan = plan
        self.model = model
        self.backend = backend
        self.rows = RowLayout(plan.max_blocks_per_row)
        self._compiled: dict[_Key, Any] = {}
        self.compile_seconds = 0.0

    def forward(self, bucket: BatchBucket) -> Any:
        """Raises RecompilationError for a bucket that was not compiled."""
        return self._find(("forward", bucket))

    def sample(self, num_rows: int, mode: SamplerMode) -> Any:
        return self._find(("sample", num_rows, mode))

    def score(self, bucket: BatchBucket) -> Any:
        """Mixed buckets only."""
        return self._find(("score", bucket))

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

    def compile(self, *, threads: int = 4, progress: bool = True) -> None:
        """Compile everything the plan's buckets need, in parallel."""
        started = time.monotonic()
        jobs = [self._forward_job(bucket) for bucket in self.plan.buckets]
        by_rows = {bucket.num_rows: bucket for bucket in self.plan.buckets}
        jobs += [
            self._sample_job(bucket, mode) for bucket in by_rows.values() for mode in SamplerMode
        ]
        mixed = [bucket for bucket in self.plan.buckets if bucket.kind is BatchKind.MIXED]
        jobs += [self._score_job(bucket) for bucket in mixed]
        # Tracing is Python and gains nothing from threads; XLA releases the GIL while it compiles.
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(job.lower().compile, _compiler_options(job.key)) for job in jobs]
            bar = tqdm(
                zip(jobs, futures, strict=True),
                total=len(jobs),
                desc="Compiling",
                unit="program",
                disable=None if progress else True,
            )
            for job, future in bar:
                self._compiled[job.key] = future.result()
        self.compile_seconds = time.monotonic() - started
        logger.info("%d programs ready in %.1f s", len(self), self.compile_seconds)

    def temp_bytes(self) -> int:
        """Largest scratch memory of any program."""
        sizes = [c.memory_analysis().temp_size_in_bytes for c in self._compiled.values()]
        return max(sizes, default=0)

    def step_program(self, bucket: BatchBucket) -> StepProgram:
        return StepProgram(self.model, self.backend, self.rows, bucket, self.plan.block_size)

    def _forward_args(self, bucket: BatchBucket) -> tuple[Any, ...]:
        plan = self.plan
        kv = kv_cache_spec(plan.model, plan.num_blocks, plan.block_size, plan.dtype)
        rows = row_buffers_spec(self.rows, plan.max_num_seqs, plan.model.vocab_size)
        return self.model.specs, kv, rows, abstract_packed(self.step_program(bucket))

    def _forward_job(self, bucket: BatchBucket) -> _Job:
        function = partial(forward, program=self.step_program(bucket))
        jitted = jax.jit(function, donate_argnums=(1, 2))
        return _Job(("forward", bucket), lambda: jitted.lower(*self._forward_args(bucket)))

    def _score_job(self, bucket: BatchBucket) -> _Job:
        program = self.step_program(bucket)
        shape = (bucket.num_tokens, self.plan.model.hidden_size)
        hidden = jax.ShapeDtypeStruct(shape, jnp.dtype(self.plan.dtype))
        args = (self.model.specs, hidden, abstract_packed(program))
        jitted = jax.jit(partial(score, program=program))
        return _Job(("score", bucket), lambda: jitted.lower(*args))

    def _sample_job(self, bucket: BatchBucket, mode: SamplerMode) -> _Job:
        """Its inputs are the same for all buckets with that many rows."""
        count, vocab = bucket.num_rows, self.plan.model.vocab_size
        rows = row_buffers_spec(self.rows, self.plan.max_num_seqs, vocab)
        logits = jax.ShapeDtypeStruct((count, vocab), jnp.float32)
        slots = jax.eval_shape(
            lambda packed: step_slots(self.step_program(bucket).layout.views(packed)),
            abstract_packed(self.step_program(bucket)),
        )
        mask = jax.ShapeDtypeStruct((count, mask_words(vocab)), jnp.int32)
        jitted = jax.jit(partial(sample, layout=self.rows, mode=mode), donate_argnums=(0,))
        return _Job(("sample", count, mode), lambda: jitted.lower(rows, logits, slots, mask))


def _compiler_options(key: _Key) -> dict[str, bool]:
    """On a GPU, XLA reads a slice in place by handing its address on, which fails at run time when
    that is not aligned: a gather of one row from an array of bytes is enough.

    For products of few rows XLA's own kernels are the fastest, for others the vendor's library is;
    left to choose, XLA takes its own too often (figures in NOTES.md).
    """
    if jax.default_backend() != "gpu":
        return {}
    options = {"xla_gpu_enable_dynamic_slice_fusion": False}
    if isinstance(key[1], BatchBucket) and key[1].num_tokens > MOST_ROWS_OF_XLA_GEMM:
        options |= {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_cublaslt": True}
    return options
