"""ModelRunner: the executor on a device. Owns parameters, KV cache and row buffers.

Arrays are replaced by every step (their predecessors are donated) and never shared. All calls come
from one thread, so steps reach the device in the order they are dispatched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.attention.kv_cache import KVCache, kv_cache_spec
from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.core.invariant import InvariantError
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.executor import LogprobArrays, ModelRunnerOutput
from jaxllm.grammar.matcher import GrammarCompiler
from jaxllm.kv_files.store import BlockStore
from jaxllm.layers.taps import TapArrays
from jaxllm.models.params import Params
from jaxllm.runner.block_moves import HostPool, Moves, abstract_blocks, in_parts
from jaxllm.runner.packing import pack, pack_idle
from jaxllm.runner.programs import Programs
from jaxllm.runner.row_layout import RowBuffers, row_buffers_spec
from jaxllm.runner.row_state import RowState
from jaxllm.runner.step import TOKENS_PER_RECOUNT, StepSlots
from jaxllm.runner.tapped_step import edits_spec
from jaxllm.runner.tapping import TapRows, TapRun, values_of
from jaxllm.sampling.metadata import Logprobs, SamplerMode, SamplerOutput
from jaxllm.sampling.token_mask import RowMask, mask_words, row_masks

# A run of forced tokens makes a mixed step of a decode step, for all rows, and saves its own row as
# many steps as it is long, but for the one under way. How much more a small mixed step costs:
LEAST_FORCED = 3
MIXED_COST = {"cpu": 1.5}


@dataclass
class StepHandle:
    """A dispatched step. ``out`` is missing while its sample half waits for a mask."""

    plan: SchedulerOutput
    bucket: BatchBucket  # of the program that ran
    mode: SamplerMode
    logits: Any
    slots: StepSlots
    prompt_logprobs: Logprobs | None
    embeddings: jax.Array | None
    wants_logprobs: bool
    masks: list[tuple[int, RowMask]]  # as dispatched: a row may change hands meanwhile
    tapped: list[tuple[TapRun, TapArrays]]
    out: SamplerOutput | None = None


class ModelRunner:
    """Implements jaxllm.engine.executor.Executor."""

    def __init__(
        self,
        plan: EnginePlan,
        params: Params,
        programs: Programs,
        grammars: GrammarCompiler | None = None,
        files: BlockStore | None = None,
    ):
        self._plan = plan
        self._files = files
        self._grammars = grammars
        self._params = params
        self._programs = programs
        self._layouts = {b: programs.step_program(b).layout for b in plan.buckets}
        self._smallest_mixed = min(b for b in plan.buckets if b.kind is BatchKind.MIXED)
        self._waiting: StepHandle | None = None  # forward dispatched, sample not yet
        self._no_mask: dict[int, jax.Array] = {}
        for bucket in plan.buckets:
            ones = np.full((bucket.num_rows, mask_words(plan.model.vocab_size)), -1, np.int32)
            self._no_mask.setdefault(bucket.num_rows, jax.device_put(ones))
        self.reset()
        if files is not None and self._kv is not None:
            block = abstract_blocks(self._kv)[0]
            files.start(block.shape, np.dtype(block.dtype))

    def reset(self) -> None:
        """Forget all rows and start from an empty KV cache (a failed step has consumed the donated
        one).
        """
        plan = self._plan
        self._kv: KVCache | None = None  # freed before the new one is allocated
        self._buffers: RowBuffers | None = None
        self._waiting = None
        if self._files is not None:
            self._files.forget()
        self._host = HostPool(self._keep)
        layout, shapes = self._programs.rows, plan.tap_shapes
        taps = None if shapes is None else TapRows.of(plan, shapes, layout.max_blocks)
        self._edits = jax.tree.map(_zeros, edits_spec(plan)) if taps is not None else None
        self._rows = RowState(
            layout,
            plan.max_num_seqs,
            plan.model.vocab_size,
            self._grammars,
            taps,
            jumps=plan.jump_forward,
        )
        specs = kv_cache_spec(
            plan.model, plan.num_blocks, plan.block_size, plan.page_dtype, plan.cache_head_dims
        )
        self._kv = tuple(_zeros(spec) for spec in specs)
        buffers = row_buffers_spec(self._programs.rows, plan.max_num_seqs, plan.model.vocab_size)
        self._buffers = jax.tree.map(_zeros, buffers)

    def warm_up(self) -> None:
        """Run every program once, on padding alone. Its first run loads a program onto the device
        and records its command buffers: a quarter of a second that no client should wait for.
        """
        for bucket, layout in self._layouts.items():
            packed = jax.device_put(pack_idle(self._rows, layout))
            logits, slots, hidden = self._forward(bucket, packed)
            if bucket.kind is BatchKind.MIXED:
                self._programs.score(bucket)(self._params, hidden, packed)
                if self._rows.taps is not None:
                    self._run_tapped(bucket, packed, [self._rows.taps.idle_run()])
                if self._plan.embeddings:
                    self._programs.embed(bucket)(hidden, packed)
            for mode in self._programs.modes(bucket.num_rows):
                self._draw(logits, slots, mode, self._no_mask[bucket.num_rows])
        nowhere = self._plan.num_blocks
        on_host = ((nowhere, 0),) if self._plan.host_blocks else ()
        self._move_blocks(on_host, ((0, nowhere),), [(0, nowhere) for _ in on_host], {})
        self._host = HostPool(self._keep)
        self._count(self._rows.scratch_row, False, np.zeros(1, np.int32))
        jax.block_until_ready((self._kv, self._buffers))

    def dispatch(self, plan: SchedulerOutput) -> StepHandle:
        """Start a step. If a row needs a mask, only its forward half starts; ``fetch`` of the step
        before, which brings the tokens the mask depends on, starts the other."""
        self._finish_waiting()
        self._rows.apply(plan)
        mode = self._rows.mode_of(plan)
        taps = self._rows.taps_of(plan)
        bucket = self._bucket(plan, mode)
        layout = self._layouts[bucket]
        while len(self._rows.patches) > layout.max_patches:
            self._forward(bucket, jax.device_put(pack_idle(self._rows, layout)))
        for slot, content in () if self._files is None else self._files.contents():
            self._host.fill(slot, content)
        self._move_blocks(
            plan.block_saves, plan.block_copies, plan.block_loads, dict(plan.block_writes)
        )
        packed = jax.device_put(pack(plan, self._rows, layout))
        tapped: list[tuple[TapRun, TapArrays]] = []
        if taps is None:
            logits, slots, hidden = self._forward(bucket, packed)
        else:
            logits, slots, hidden, tapped = self._run_tapped(bucket, packed, taps.runs(plan))
        for skipped in self._rows.take_skipped():
            self._count(*skipped)
        scored: Logprobs | None = None
        if self._rows.scores_prompts(plan):
            scored = self._programs.score(bucket)(self._params, hidden, packed)
        embeddings: jax.Array | None = None
        if self._rows.embeds(plan):
            embeddings = self._programs.embed(bucket)(hidden, packed)
        handle = StepHandle(
            plan,
            bucket,
            mode,
            logits,
            slots,
            scored,
            embeddings,
            bool(self._rows.logprobs[plan.rows].any()),
            self._rows.masks_of(plan),
            tapped,
        )
        if handle.masks:
            self._waiting = handle
        else:
            self._sample(handle, self._no_mask[bucket.num_rows])
        return handle

    def _bucket(self, plan: SchedulerOutput, mode: SamplerMode) -> BatchBucket:
        """The scheduler's choice; but only mixed programs clear token counts, score and embed
        prompts and have taps, which a step that feeds one token per row wants now and then, and
        only some numbers of rows have a FULL sampler."""
        if plan.bucket.kind is BatchKind.MIXED:
            return plan.bucket
        state = self._rows
        wants_more = state.scores_prompts(plan) or state.embeds(plan)
        if state.resets or wants_more or state.taps_of(plan) is not None:
            return self._smallest_mixed
        if mode is SamplerMode.FULL:
            rows = next(n for n in self._programs.full_rows if n >= plan.bucket.num_rows)
            return BatchBucket(rows, rows, BatchKind.DECODE)
        return plan.bucket

    def fetch(self, handle: StepHandle) -> ModelRunnerOutput:
        """Wait for a step's results. Device errors surface here."""
        if self._waiting is handle:
            self._finish_waiting()
        out, count = handle.out, len(handle.plan.rows)
        if out is None:
            raise InvariantError(f"Step {handle.plan.step_id} was fetched before it was sampled.")
        token_ids = np.asarray(out.token_ids)[:count]
        forced = self._follow(handle, token_ids)
        self._finish_waiting()
        self._host.settle()
        num_tokens = handle.plan.num_tokens
        scored = handle.prompt_logprobs
        return ModelRunnerOutput(
            handle.plan.step_id,
            token_ids,
            np.asarray(out.finite)[:count],
            _on_host(out.logprobs, count) if out.logprobs and handle.wants_logprobs else None,
            None if scored is None else _on_host(scored, num_tokens),
            handle.bucket.num_tokens,
            None if handle.embeddings is None else np.asarray(handle.embeddings)[:count],
            forced,
            values_of(handle.tapped),
        )

    def _follow(
        self, handle: StepHandle, token_ids: np.ndarray
    ) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Let masks know what was drawn. What they leave no choice about then, by entry."""
        plan = handle.plan
        dearer = MIXED_COST.get(jax.default_backend(), 0.1)
        least = LEAST_FORCED + int(dearer * plan.rows.size)
        found: list[tuple[int, tuple[int, ...]]] = []
        for slot, mask in handle.masks:
            if not _is_next(mask, plan, slot):
                continue
            mask.extend((int(token_ids[slot]),))
            scored = self._rows.logprobs[plan.rows[slot]]
            if not scored and (forced := mask.take_forced(least)):
                found.append((slot, forced))
        return tuple(found)

    def _forward(self, bucket: BatchBucket, packed: jax.Array) -> tuple[Any, StepSlots, jax.Array]:
        program = self._programs.forward(bucket)
        kv, buffers = self._kv, self._buffers
        self._kv = self._buffers = None  # donated: whatever happens now, they are gone
        result = program(self._params, kv, buffers, packed)
        self._kv, self._buffers, logits, slots, hidden = result
        return logits, slots, hidden

    def _run_tapped(
        self, bucket: BatchBucket, packed: jax.Array, runs: list[TapRun]
    ) -> tuple[Any, StepSlots, jax.Array, list[tuple[TapRun, TapArrays]]]:
        """The step as often as it takes to read all: each run writes the same keys and values. What
        all but the last have read waits on the host.
        """
        for row, values in self._rows.taps.take_changes().items() if self._rows.taps else ():
            edits, self._edits = self._edits, None
            self._edits = self._programs.edit(edits, np.int32(row), values)
        program, tapped = self._programs.tapped(bucket), list[tuple[TapRun, TapArrays]]()
        for run in runs:
            if tapped:
                tapped[-1] = (tapped[-1][0], jax.device_get(tapped[-1][1]))
            kv, buffers = self._kv, self._buffers
            self._kv = self._buffers = None
            result = program(self._params, kv, buffers, packed, self._edits, run.reads)
            self._kv, self._buffers, logits, slots, hidden, found = result
            tapped.append((run, found))
        return logits, slots, hidden, tapped

    def _keep(self, name: bytes, content: np.ndarray) -> None:
        if self._files is not None:
            self._files.write(name, content)

    def _move_blocks(
        self, saves: Moves, copies: Moves, loads: Moves, names: Mapping[int, bytes]
    ) -> None:
        """``names``: of the saves that get a file, by index.

        Where one program does not take all copies, the order is right still: what is copied was
        computed by earlier steps, so no later source is an earlier target.
        """
        nowhere = self._plan.num_blocks
        index = 0
        for slots, ids in in_parts([(slot, block) for block, slot in saves], nowhere):
            blocks = self._programs.move("save")(self._kv, jax.device_put(ids))
            for slot, block in zip(slots, blocks, strict=False):
                self._host.put(slot, block, names.get(index))
                index += 1
        for sources, targets in in_parts(copies, nowhere):
            ids = np.zeros((2, targets.size), np.int32)
            ids[0, : len(sources)], ids[1] = sources, targets
            kv, self._kv = self._kv, None
            self._kv = self._programs.move("copy")(kv, jax.device_put(ids))
        for slots, ids in in_parts(loads, nowhere):
            contents = self._host.get(slots)
            blocks = jax.device_put((*contents, *contents[:1] * (ids.size - len(contents))))
            kv, self._kv = self._kv, None
            self._kv = self._programs.move("load")(kv, jax.device_put(ids), blocks)

    def _count(self, row: int, is_output: bool, token_ids: np.ndarray) -> None:
        for first in range(0, token_ids.size, TOKENS_PER_RECOUNT):
            part = token_ids[first : first + TOKENS_PER_RECOUNT]
            packed = np.full(2 + TOKENS_PER_RECOUNT, self._plan.model.vocab_size, np.int32)
            packed[:2] = row, is_output
            packed[2 : 2 + part.size] = part
            buffers, self._buffers = self._buffers, None
            self._buffers = self._programs.recount(buffers, jax.device_put(packed))

    def _sample(self, handle: StepHandle, mask: jax.Array) -> None:
        handle.out = self._draw(handle.logits, handle.slots, handle.mode, mask)
        handle.logits = None
        for array in (handle.out.token_ids, handle.out.finite):
            array.copy_to_host_async()

    def _draw(
        self, logits: jax.Array, slots: StepSlots, mode: SamplerMode, mask: jax.Array
    ) -> SamplerOutput:
        program = self._programs.sample(logits.shape[0], mode)
        buffers, self._buffers = self._buffers, None
        self._buffers, out = program(buffers, logits, slots, mask)
        return out

    def _finish_waiting(self) -> None:
        """Fill the mask of the step that waits for it, and start its sample half."""
        handle, self._waiting = self._waiting, None
        if handle is None:
            return
        due = [(slot, mask) for slot, mask in handle.masks if _is_next(mask, handle.plan, slot)]
        mask = row_masks(due, handle.logits.shape[0], self._plan.model.vocab_size)
        self._sample(handle, jax.device_put(mask))


def _is_next(mask: RowMask, plan: SchedulerOutput, slot: int) -> bool:
    """Whether the token drawn there is the one that the mask is for, not one known by now."""
    return mask.position == plan.starts[slot] + plan.num_new_tokens[slot]


def _zeros(spec: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(spec.shape, spec.dtype)


def _on_host(logprobs: Logprobs, count: int) -> LogprobArrays:
    token, rank, ids, top = (
        np.asarray(array)[:count]
        for array in (logprobs.token, logprobs.rank, logprobs.top_ids, logprobs.top)
    )
    return LogprobArrays(token, rank, ids, top)
