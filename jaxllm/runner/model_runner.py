"""ModelRunner: the executor on a device. Owns parameters, KV cache, row buffers and spare arrays.

Arrays are replaced by every step (their predecessors are donated) and never shared. All calls come
from one thread, so steps reach the device in the order they are dispatched.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.attention.kv_cache import KVCache, kv_cache_spec
from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.core.invariant import InvariantError
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.executor import LogprobArrays, ModelRunnerOutput
from jaxllm.grammar.compiler import GrammarCompiler
from jaxllm.grammar.matcher import PARALLEL_FROM
from jaxllm.kv_files.store import BlockStore
from jaxllm.layers.taps import TapArrays
from jaxllm.models.params import Params
from jaxllm.parallel.mesh import KV_PAGES
from jaxllm.runner.block_moves import Moves, in_parts
from jaxllm.runner.host_pool import HostPool
from jaxllm.runner.masking import Followed, MaskedStep, Masking
from jaxllm.runner.packing import pack, pack_idle, pack_targets
from jaxllm.runner.programs import Programs
from jaxllm.runner.row_layout import RowBuffers, row_buffers_spec
from jaxllm.runner.row_state import RowState
from jaxllm.runner.spares import Spares
from jaxllm.runner.step import TOKENS_PER_RECOUNT, StepSlots
from jaxllm.runner.tapped_step import edits_spec
from jaxllm.runner.tapping import TapRows, TapRun, values_of
from jaxllm.sampling.metadata import Logprobs, SamplerMode, SamplerOutput
from jaxllm.sampling.token_mask import mask_words


@dataclass
class StepHandle:
    """A dispatched step. ``out`` is missing while its sample half waits for a mask."""

    plan: SchedulerOutput
    bucket: BatchBucket  # of the program that ran
    mode: SamplerMode
    forwarded: Any  # logits, slots and hidden states; None once the sample half has started
    prompt_logprobs: list[Logprobs]  # of as many tokens each as ``score`` takes
    embeddings: jax.Array | None
    wants_logprobs: bool
    masked: MaskedStep
    tapped: list[tuple[TapRun, TapArrays]]
    masks: Future[np.ndarray] | None  # where the thread beside fills them
    out: SamplerOutput | None = None
    followed: Future[Followed] | None = None  # once a step behind it waits for masks


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
        self._devices = programs.devices
        self._layouts = {b: programs.step_program(b).layout for b in plan.buckets}
        self._waiting: StepHandle | None = None  # forward dispatched, sample not yet
        self._last: StepHandle | None = None  # dispatched and not fetched
        self._masking = Masking(plan.model.vocab_size)
        self._no_mask: dict[int, jax.Array] = {}
        for bucket in plan.buckets:
            ones = np.full((bucket.num_rows, mask_words(plan.model.vocab_size)), -1, np.int32)
            self._no_mask.setdefault(bucket.num_rows, self._devices.put(ones))
        self.reset()
        if files is not None:
            block = programs.host_block
            files.start(block.shape, np.dtype(block.dtype))

    def reset(self) -> None:
        """Forget all rows and start from an empty KV cache (a failed step has consumed the donated
        one).
        """
        plan = self._plan
        self._kv: KVCache | None = None  # freed before the new one is allocated
        self._buffers: RowBuffers | None = None
        self._spares = Spares()
        self._waiting = self._last = None
        if self._files is not None:
            self._files.forget()
        self._host = HostPool(self._keep, self._devices)
        layout, shapes = self._programs.rows, plan.tap_shapes
        taps = None if shapes is None else TapRows.of(plan, shapes, layout.max_blocks)
        self._edits = (
            jax.tree.map(self._devices.zeros, edits_spec(plan)) if taps is not None else None
        )
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
        self._kv = tuple(self._devices.zeros(spec, KV_PAGES) for spec in specs)
        buffers = row_buffers_spec(self._programs.rows, plan.max_num_seqs, plan.model.vocab_size)
        self._buffers = jax.tree.map(self._devices.zeros, buffers)

    def warm_up(self) -> None:
        """Run every program once, on padding alone. Its first run loads a program onto the device
        and records its command buffers: a quarter of a second that no client should wait for.
        """
        for bucket, layout in self._layouts.items():
            packed = self._devices.put(pack_idle(self._rows, layout))
            logits, slots, hidden = self._forward(bucket, packed)
            if bucket.kind is BatchKind.MIXED:
                idle = np.zeros((1, self._programs.hidden.scored), np.int32)
                self._score(hidden, idle)
                if self._rows.taps is not None:
                    self._run_tapped(bucket, packed, [self._rows.taps.idle_run()])
                if self._plan.embeddings:
                    self._programs.embed(bucket.num_rows)(hidden, slots)
            for mode in self._programs.modes(bucket.num_rows):
                out = self._draw(logits, slots, mode, self._no_mask[bucket.num_rows])
                self._spares.give("sample", out)
            self._spares.give("forward", (logits, slots, hidden))
        nowhere = self._plan.num_blocks
        on_host = ((nowhere, 0),) if self._plan.host_blocks else ()
        self.move_blocks(on_host, ((0, nowhere),), [(0, nowhere) for _ in on_host], {})
        self._host.forget()
        self._count(self._rows.scratch_row, False, np.zeros(1, np.int32))
        self.wait()

    def wait(self) -> None:
        """Until all that was begun is done, copies of blocks included."""
        jax.block_until_ready((self._kv, self._buffers))
        self._host.make_room(0)

    def dispatch(self, plan: SchedulerOutput) -> StepHandle:
        """Start a step. If a row needs a mask, only its forward half starts. The other starts when
        the step before was fetched, whose tokens the mask depends on: then, or where masks are
        filled beside, with the next call."""
        self._rows.apply(plan)
        mode = self._rows.mode_of(plan)
        taps = self._rows.taps_of(plan)
        bucket = self._bucket(plan, mode)
        mode = self._programs.mode_for(bucket.num_rows, mode)
        layout = self._layouts[bucket]
        carriers: list[jax.Array] = []
        while len(self._rows.patches) > layout.max_patches:
            carriers.append(self._devices.put(pack_idle(self._rows, layout)))
        packed = self._devices.put(pack(plan, self._rows, layout))
        self._finish_waiting()  # before a program brings the rows' patches
        for carrier in carriers:
            self._spares.give("forward", self._forward(bucket, carrier))
        for slot, content in () if self._files is None else self._files.contents():
            self._host.fill(slot, content)
        self.move_blocks(
            plan.block_saves, plan.block_copies, plan.block_loads, dict(plan.block_writes)
        )
        told = self._rows.logprobs[plan.rows]
        masked = MaskedStep(plan, self._rows.masks_of(plan), told, bucket.num_rows)
        tapped: list[tuple[TapRun, TapArrays]] = []
        if taps is None:
            logits, slots, hidden = self._forward(bucket, packed)
        else:
            logits, slots, hidden, tapped = self._run_tapped(bucket, packed, taps.runs(plan))
        for skipped in self._rows.take_skipped():
            self._count(*skipped)
        scored: list[Logprobs] = []
        if self._rows.scores_prompts(plan):
            targets = pack_targets(plan, self._rows, self._programs.hidden.scored)
            scored = self._score(hidden, targets)
        embeddings: jax.Array | None = None
        if self._rows.embeds(plan):
            embeddings = self._programs.embed(bucket.num_rows)(hidden, slots)
        masks = self._follow_last(masked)  # no sooner: both would want Python's lock
        handle = StepHandle(
            plan,
            bucket,
            mode,
            (logits, slots, hidden),
            scored,
            embeddings,
            bool(told.any()),
            masked,
            tapped,
            masks,
        )
        self._last = handle
        if masked.masks:
            self._waiting = handle
        else:
            self._sample(handle, self._no_mask[bucket.num_rows])
        return handle

    def _bucket(self, plan: SchedulerOutput, mode: SamplerMode) -> BatchBucket:
        """The scheduler's choice; but only mixed programs clear token counts, score and embed
        prompts, take numbers of tokens and have taps, which a step that feeds one token per row
        wants now and then, and only some numbers of rows have a FULL sampler."""
        if plan.bucket.kind is BatchKind.MIXED:
            return plan.bucket
        state = self._rows
        wants_more = state.scores_prompts(plan) or state.embeds(plan) or state.numbered(plan)
        if state.resets or wants_more or state.taps_of(plan) is not None:
            rows = plan.bucket.num_rows
            return min(b for b in self._layouts if b.kind is BatchKind.MIXED and b.num_rows >= rows)
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
        if handle.followed is not None:
            followed = handle.followed.result()
            token_ids, forced = followed.token_ids, followed.forced
        else:
            token_ids = np.asarray(out.token_ids)[:count]
            forced = self._masking.follow(handle.masked, token_ids)
            self._finish_waiting()
        if self._last is handle:
            self._last = None
        finite = np.asarray(out.finite)[:count]
        wanted = out.logprobs if handle.wants_logprobs else None
        logprobs = None if wanted is None else _on_host(wanted, count)
        self._spares.give("sample", out)
        return ModelRunnerOutput(
            handle.plan.step_id,
            token_ids,
            finite,
            logprobs,
            _joined(handle.prompt_logprobs, handle.plan.num_tokens),
            handle.bucket.num_tokens,
            None if handle.embeddings is None else np.asarray(handle.embeddings)[:count],
            forced,
            values_of(handle.tapped),
        )

    def _forward(self, bucket: BatchBucket, packed: jax.Array) -> tuple[Any, StepSlots, jax.Array]:
        program = self._programs.forward(bucket)
        kv, buffers = self._kv, self._buffers
        self._kv = self._buffers = None  # donated: whatever happens now, they are gone
        result = self._spares.run(program, self._params, kv, buffers, packed)
        self._kv, self._buffers, logits, slots, hidden = result
        return logits, slots, hidden

    def _score(self, hidden: jax.Array, targets: np.ndarray) -> list[Logprobs]:
        """``targets``: [N, C], the tokens after each of the step's."""
        starts = range(0, targets.size, targets.shape[1])
        return [
            self._programs.score(self._params, hidden, np.int32(start), self._devices.put(part))
            for start, part in zip(starts, targets, strict=True)
        ]

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

    def _keep(self, name: bytes, content: jax.Array) -> None:
        if self._files is not None:
            self._files.write(name, content)

    def keep(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        """Write blocks, each (block, name), to files, after the last step: what the host's memory
        holds is lost.
        """
        saves = [(block_id, slot) for slot, (block_id, _) in enumerate(blocks)]
        self.move_blocks(saves, (), (), {slot: name for slot, (_, name) in enumerate(blocks)})

    def move_blocks(
        self, saves: Moves, copies: Moves, loads: Moves, names: Mapping[int, bytes]
    ) -> None:
        """Begin to move whole blocks, as a step's ``block_saves``, ``block_copies`` and
        ``block_loads`` say. ``names``: of the saves that get a file, by index.

        Where one program does not take all copies, the order is right still: what is copied was
        computed by earlier steps, so no later source is an earlier target.
        """
        nowhere = self._plan.num_blocks
        index = 0
        for slots, ids in in_parts([(slot, block) for block, slot in saves], nowhere):
            self._host.make_room()
            blocks = self._programs.move("save")(self._kv, self._devices.put(ids))
            self._host.put(slots, blocks, [names.get(index + i) for i in range(len(slots))])
            index += len(slots)
        for sources, targets in in_parts(copies, nowhere):
            ids = np.zeros((2, targets.size), np.int32)
            ids[0, : len(sources)], ids[1] = sources, targets
            kv, self._kv = self._kv, None
            self._kv = self._programs.move("copy")(kv, self._devices.put(ids))
        for ids, found in self._host.bring(in_parts(loads, nowhere)):
            blocks = (*found, *found[:1] * (ids.size - len(found)))
            kv, self._kv = self._kv, None
            self._kv = self._programs.move("load")(kv, self._devices.put(ids), blocks)

    def _count(self, row: int, is_output: bool, token_ids: np.ndarray) -> None:
        for first in range(0, token_ids.size, TOKENS_PER_RECOUNT):
            part = token_ids[first : first + TOKENS_PER_RECOUNT]
            packed = np.full(2 + TOKENS_PER_RECOUNT, self._plan.model.vocab_size, np.int32)
            packed[:2] = row, is_output
            packed[2 : 2 + part.size] = part
            buffers, self._buffers = self._buffers, None
            self._buffers = self._programs.recount(buffers, self._devices.put(packed))

    def _sample(self, handle: StepHandle, mask: jax.Array) -> None:
        logits, slots, _ = handle.forwarded
        handle.out = self._draw(logits, slots, handle.mode, mask)
        self._spares.give("forward", handle.forwarded)
        handle.forwarded = None
        for array in (handle.out.token_ids, handle.out.finite):
            array.copy_to_host_async()

    def _draw(
        self, logits: jax.Array, slots: StepSlots, mode: SamplerMode, mask: jax.Array
    ) -> SamplerOutput:
        program = self._programs.sample(logits.shape[0], mode)
        buffers, self._buffers = self._buffers, None
        self._buffers, out = self._spares.run(program, buffers, logits, slots, mask)
        return out

    def _follow_last(self, step: MaskedStep) -> Future[np.ndarray] | None:
        """The masks of ``step`` depend on the tokens of the one before, which is under way: have
        them filled beside what is done here, if they are many.
        """
        last = self._last
        if last is None or last.out is None or not last.masked.masks:
            return None
        if len(step.masks) < PARALLEL_FROM:
            return None
        token_ids = last.out.token_ids
        last.followed, masks = self._masking.follow_beside(last.masked, token_ids, step)
        return masks

    def _finish_waiting(self) -> None:
        """Start the sample half of the step that waits for its masks, if there is one."""
        handle, self._waiting = self._waiting, None
        if handle is not None:
            beside = handle.masks
            masks = self._masking.fill(handle.masked) if beside is None else beside.result()
            self._sample(handle, self._devices.put(masks))


def _on_host(logprobs: Logprobs, count: int) -> LogprobArrays:
    token, rank, ids, top = (
        np.asarray(array)[:count]
        for array in (logprobs.token, logprobs.rank, logprobs.top_ids, logprobs.top)
    )
    return LogprobArrays(token, rank, ids, top)


def _joined(parts: list[Logprobs], count: int) -> LogprobArrays | None:
    if not parts:
        return None
    whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    return _on_host(whole, count)
