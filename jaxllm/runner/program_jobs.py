"""What there is to compile for a plan: each program's function and abstract arguments."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.attention.backend import AttentionBackend
from jaxllm.attention.kv_cache import kv_cache_spec
from jaxllm.attention.variants import row_params, token_params
from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.models.params import ModelDef
from jaxllm.parallel.mesh import KV_BLOCK, KV_PAGES, WHOLE, Specs, param_specs
from jaxllm.runner.block_moves import (
    abstract_blocks,
    abstract_ids,
    copy_blocks,
    load_blocks,
    save_blocks,
)
from jaxllm.runner.row_layout import RowLayout, row_buffers_spec
from jaxllm.runner.step import (
    HiddenShape,
    StepProgram,
    StepSlots,
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
from pallas_kernels.sampling.sample_sm90 import refuses_sample_sm90

# What a program is compiled for: forward or tapped and its bucket, sample and its rows and mode,
# embed and its rows; of the others there is one for all.
Key = tuple[str] | tuple[str, BatchBucket] | tuple[str, int] | tuple[str, int, SamplerMode]


@dataclass(frozen=True)
class Job:
    key: Key
    function: Callable[..., Any]
    args: tuple[Any, ...]  # abstract
    donated: tuple[int, ...] = ()
    # Results from this one on are written over those of earlier steps; None: into fresh memory.
    overwrites_from: int | None = None
    # What of its arguments and results each device has; all of the others.
    given: Specs = WHOLE
    made: Specs = WHOLE

    @property
    def name(self) -> str:
        return " ".join(map(str, self.key))


_FEW_ROWS = 64  # as many cost what one does on a GPU, where reading the weights takes the time


class ProgramJobs:
    """Of a plan whose number of KV blocks may still change."""

    def __init__(self, plan: EnginePlan, model: ModelDef, backend: AttentionBackend, platform: str):
        """``platform``: the device that programs are compiled for, as pallas_kernels names it."""
        self.plan = plan
        self.model = model
        self.params = param_specs(model.cuts)
        self.backend = backend
        # As wide as the first plan has it, even where a later one holds no row of that length.
        kept = (row_params(plan.model), token_params(plan.model))
        self.rows = RowLayout(plan.max_blocks_per_row, *kept)
        self.hidden = HiddenShape.of(plan.buckets)
        self.sampling_platform = platform

    def jobs(self) -> list[Job]:
        """All of them; what takes longest to compile comes first."""
        by_tokens = sorted(self.plan.buckets, reverse=True)
        jobs = [self._forward_job(bucket) for bucket in by_tokens]
        if self.plan.taps:
            jobs += [self._tapped_job(b) for b in by_tokens if b.kind is BatchKind.MIXED]
        return [*jobs, *self._fixed_jobs(), *self._move_jobs()]

    @property
    def full_rows(self) -> tuple[int, ...]:
        counts = {bucket.num_rows for bucket in self.plan.buckets}
        return full_rows(counts, self.sampling_platform)

    def modes(self, num_rows: int) -> tuple[SamplerMode, ...]:
        """Those that there is a sampler for. A greedy one only where it is faster than the random
        one: Hopper's kernels take few rows as fast as XLA finds their largest logits.
        """
        by_kernels = refuses_sample_sm90(self.plan.model.vocab_size, self.sampling_platform) is None
        missing = set[SamplerMode]()
        if num_rows not in self.full_rows:
            missing.add(SamplerMode.FULL)
        if by_kernels and num_rows <= _FEW_ROWS:
            missing.add(SamplerMode.GREEDY)
        return tuple(mode for mode in SamplerMode if mode not in missing)

    def _fixed_jobs(self) -> list[Job]:
        """Those that the number of KV blocks does not shape."""
        by_rows = {bucket.num_rows: bucket for bucket in self.plan.buckets}
        jobs = [
            self._sample_job(bucket, mode)
            for bucket in by_rows.values()
            for mode in self.modes(bucket.num_rows)
        ]
        jobs.append(Job(("recount",), recount, (self._row_buffers(), abstract_recount()), (0,)))
        if self.hidden.tokens:
            jobs.append(self._score_job())
        if self.plan.taps:
            jobs.append(self._edit_job())
        if self.plan.embeddings:
            mixed = {b.num_rows: b for b in self.plan.buckets if b.kind is BatchKind.MIXED}
            jobs += [self._embed_job(bucket) for bucket in mixed.values()]
        return jobs

    def step_program(self, bucket: BatchBucket) -> StepProgram:
        tokens = self.hidden.tokens if bucket.kind is BatchKind.MIXED else 0
        block_size = self.plan.block_size
        return StepProgram(self.model, self.backend, self.rows, bucket, block_size, tokens)

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

    def _move_jobs(self) -> list[Job]:
        kv, ids = self._kv(), abstract_ids()
        given = (KV_PAGES, WHOLE)
        updates: dict[str, Any] = {"donated": (0,), "made": KV_PAGES}
        jobs = [Job(("copy",), copy_blocks, (kv, abstract_ids(2)), given=given, **updates)]
        if self.plan.host_blocks:
            jobs.append(Job(("save",), save_blocks, (kv, ids), given=given, made=KV_BLOCK))
            blocks, given = abstract_blocks(kv), (KV_PAGES, WHOLE, KV_BLOCK)
            jobs.append(Job(("load",), load_blocks, (kv, ids, blocks), given=given, **updates))
        return jobs

    def _forward_job(self, bucket: BatchBucket) -> Job:
        function = partial(forward, program=self.step_program(bucket))
        return Job(
            ("forward", bucket),
            function,
            self._forward_args(bucket),
            donated=(1, 2),
            overwrites_from=2,
            given=(self.params, KV_PAGES, WHOLE, WHOLE),
            made=(KV_PAGES, WHOLE, WHOLE, WHOLE, WHOLE),
        )

    def _tapped_job(self, bucket: BatchBucket) -> Job:
        sizes = TapSizes.of(self.plan, self.rows.max_blocks)
        function = partial(tapped_forward, program=self.step_program(bucket), sizes=sizes)
        reads = reads_spec(self.plan.model.num_layers, sizes)
        args = (*self._forward_args(bucket), edits_spec(self.plan), reads)
        return Job(("tapped", bucket), function, args, donated=(1, 2))

    def _edit_job(self) -> Job:
        edits = edits_spec(self.plan)
        one = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype), edits)
        row = jax.ShapeDtypeStruct((), jnp.int32)
        return Job(("edit",), set_edits, (edits, row, one), donated=(0,))

    def _score_job(self) -> Job:
        start = jax.ShapeDtypeStruct((), jnp.int32)
        targets = jax.ShapeDtypeStruct((self.hidden.scored,), jnp.int32)
        args = (self.model.specs, self._hidden(), start, targets)
        given = (self.params, WHOLE, WHOLE, WHOLE)
        return Job(("score",), partial(score, model=self.model), args, given=given)

    def _embed_job(self, bucket: BatchBucket) -> Job:
        return Job(("embed", bucket.num_rows), embed, (self._hidden(), self._slots(bucket)))

    def _hidden(self) -> jax.ShapeDtypeStruct:
        shape = (self.hidden.tokens, self.plan.model.hidden_size)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.plan.dtype))

    def _slots(self, bucket: BatchBucket) -> StepSlots:
        """The same for all buckets with that many rows."""
        program = self.step_program(bucket)
        return jax.eval_shape(
            lambda packed: step_slots(program.layout.views(packed)), abstract_packed(program)
        )

    def _sample_job(self, bucket: BatchBucket, mode: SamplerMode) -> Job:
        """Its inputs are the same for all buckets with that many rows."""
        count, vocab = bucket.num_rows, self.plan.model.vocab_size
        rows, slots = self._row_buffers(), self._slots(bucket)
        logits = jax.ShapeDtypeStruct((count, vocab), jnp.float32)
        mask = jax.ShapeDtypeStruct((count, mask_words(vocab)), jnp.int32)
        platform = self.sampling_platform
        function = partial(sample, layout=self.rows, mode=mode, platform=platform)
        args = (rows, logits, slots, mask)
        return Job(("sample", count, mode), function, args, donated=(0,), overwrites_from=1)


def full_rows(counts: Iterable[int], platform: str) -> tuple[int, ...]:
    """Of the numbers of rows that there are, those whose FULL sampler is compiled; a step of fewer
    rows takes the next larger bucket.
    """
    counts = sorted(counts)
    least = 1 if platform == "cpu" else min(_FEW_ROWS, counts[-1])
    return tuple(count for count in counts if count >= least)
