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
from jaxllm.config.plan import BatchBucket, EnginePlan
from jaxllm.errors import RecompilationError
from jaxllm.models.params import ModelDef
from jaxllm.runner.row_layout import RowLayout, row_buffers_spec
from jaxllm.runner.step import StepProgram, abstract_packed, forward, sample, step_slots
from jaxllm.sampling.token_mask import mask_words

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    key: BatchBucket | int
    lower: Callable[[], Any]


class Programs:
    """Executables: ``forward(bucket)``, and ``sample(num_rows)``."""

    def __init__(self, plan: EnginePlan, model: ModelDef, backend: AttentionBackend):
        self.plan = plan
        self.model = model
        self.backend = backend
        self.rows = RowLayout(plan.max_blocks_per_row)
        self._compiled: dict[BatchBucket | int, Any] = {}
        self.compile_seconds = 0.0

    def forward(self, bucket: BatchBucket) -> Any:
        """Raises RecompilationError for a bucket that was not compiled."""
        return self._find(bucket)

    def sample(self, num_rows: int) -> Any:
        return self._find(num_rows)

    def _find(self, key: BatchBucket | int) -> Any:
        try:
            return self._compiled[key]
        except KeyError:
            wanted = f"sampling {key} rows" if isinstance(key, int) else str(key)
            known = ", ".join(str(bucket) for bucket in self.plan.buckets)
            raise RecompilationError(
                f"No program was compiled for {wanted}; buckets: {known}."
            ) from None

    def __len__(self) -> int:
        return len(self._compiled)

    def compile(self, *, threads: int = 4, progress: bool = True) -> None:
        """Compile everything the plan's buckets need, in parallel."""
        started = time.monotonic()
        jobs = [self._forward_job(bucket) for bucket in self.plan.buckets]
        by_rows = {bucket.num_rows: bucket for bucket in self.plan.buckets}
        jobs += [self._sample_job(bucket) for bucket in by_rows.values()]
        # Tracing is Python and gains nothing from threads; XLA releases the GIL while it compiles.
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(job.lower().compile, _compiler_options()) for job in jobs]
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
        return _Job(bucket, lambda: jitted.lower(*self._forward_args(bucket)))

    def _sample_job(self, bucket: BatchBucket) -> _Job:
        """Its inputs are the same for all buckets with that many rows."""
        count, vocab = bucket.num_rows, self.plan.model.vocab_size
        rows = row_buffers_spec(self.rows, self.plan.max_num_seqs, vocab)
        logits = jax.ShapeDtypeStruct((count, vocab), jnp.float32)
        slots = jax.eval_shape(
            lambda packed: step_slots(self.step_program(bucket).layout.views(packed)),
            abstract_packed(self.step_program(bucket)),
        )
        mask = jax.ShapeDtypeStruct((count, mask_words(vocab)), jnp.int32)
        jitted = jax.jit(partial(sample, layout=self.rows), donate_argnums=(0,))
        return _Job(count, lambda: jitted.lower(rows, logits, slots, mask))


def _compiler_options() -> dict[str, bool]:
    """On a GPU, XLA reads a slice in place by handing its address on, which fails at run time when
    that is not aligned: a gather of one row from an array of bytes is enough."""
    if jax.default_backend() != "gpu":
        return {}
    return {"xla_gpu_enable_dynamic_slice_fusion": False}
