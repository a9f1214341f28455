"""The engine's one loop body: schedule, dispatch, fetch, update. Owns the step pipeline.

Knows token ids and rows; knows no text, no HTTP, no JAX. Not thread-safe: one thread calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import msgspec

from jaxllm.core.disk_tier import DiskNews
from jaxllm.core.invariant import InvariantError
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.core.unfiled import unfiled_blocks
from jaxllm.engine.block_files import BlockFiles, NoBlockFiles
from jaxllm.engine.clock import Clock, MonotonicClock
from jaxllm.engine.executor import Executor, ModelRunnerOutput
from jaxllm.engine.latency_target import LatencyTarget
from jaxllm.engine.queue_times import QueueTimes
from jaxllm.engine.recovery import Recovery
from jaxllm.engine.request_validator import validate_request
from jaxllm.engine.step_checks import check_output, check_step
from jaxllm.messages import (
    Admission,
    Compilations,
    EngineCoreOutput,
    EngineCoreRequest,
    EngineStats,
    StepOutputs,
)

BLOCKS_AT_ONCE = 8  # that are written when the engine ends
MAX_WAIT_S = 0.05  # for files, when there is nothing else to do; messages wait as long

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Dispatched:
    step: SchedulerOutput
    handle: Any  # the executor's
    dispatched: float  # on the engine's clock


class StepFailed(Exception):
    """Dispatch or fetch raised; the cause is chained."""


class EngineCore:
    """Runs requests through a scheduler and an executor.

    With ``async_scheduling`` step N+1 is scheduled and dispatched before step N is fetched, so
    the device never waits for the host; otherwise each step is fetched at once.

    Whatever the executor raises stays inside: the executor is reset, running requests are
    computed anew, and only the request that makes steps fail ends, with an error. What the
    scheduler itself raises is a bug in the books; it leaves ``step`` and should end the process.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        *,
        async_scheduling: bool = True,
        latency_target: LatencyTarget | None = None,
        clock: Clock | None = None,
        compilations: Callable[[], Compilations] = Compilations,
        files: BlockFiles | None = None,
        keep: Callable[[Sequence[tuple[int, bytes]]], None] | None = None,
    ):
        """``keep`` writes blocks, each (block, name), to ``files``."""
        self.scheduler = scheduler
        self.executor = executor
        self.async_scheduling = async_scheduling
        self.recovery = Recovery(scheduler)
        self._files = files or NoBlockFiles()
        self._keep = keep
        self._torn = False  # a step that was interrupted: the books tell of what was not computed
        self._in_flight: Dispatched | None = None
        self._clock = clock or MonotonicClock()
        self._latency_target = latency_target
        self._fetched = 0.0  # when the last results were there
        self._compilations = compilations
        self._queue_times = QueueTimes(self._clock)
        self._num_tokens = self._num_token_slots = 0
        # To be told with the next step:
        self._events: list[EngineCoreOutput] = []
        self._admitted: list[Admission] = []
        self._num_step_tokens: list[int] = []

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it can never succeed as it stands; nothing was queued.
        """
        plan = self.scheduler.plan
        validate_request(
            request,
            plan.model.vocab_size,
            plan.max_model_len,
            embeddings=plan.embeddings,
            attention_params=plan.attention_params,
            taps=plan.tap_shapes,
        )
        self.scheduler.add_request(request)
        self._queue_times.add(request.request_id)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests; the next ``step`` tells their last output. Unknown ids are ignored."""
        ended = self.scheduler.abort(request_ids)
        self._events += ended
        self._queue_times.forget(output.request_id for output in ended)
        self.recovery.advance()

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to tell."""
        return self.scheduler.has_work() or self._in_flight is not None or bool(self._events)

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(
            self.scheduler.stats(),
            num_tokens=self._num_tokens,
            num_token_slots=self._num_token_slots,
            compilations=self._compilations(),
        )

    def step(self, meanwhile: Callable[[], object] | None = None) -> StepOutputs | None:
        """Advance the pipeline by one step. None if there is nothing to tell.

        Every request that was added gets exactly one output with a finish_reason, its last.
        ``meanwhile`` is called once the device has its next work, unless it could not be given any,
        and before its results are waited for; it must leave the engine alone.
        """
        self._torn = True
        outputs = self._step(meanwhile)
        self._torn = False
        return outputs

    def _step(self, meanwhile: Callable[[], object] | None) -> StepOutputs | None:
        news = self._files.take()
        if news is not None:
            self.hear(news)
        target = self._latency_target
        step = self.scheduler.schedule(None if target is None else target.token_limit)
        if step is not None and step.new_rows:
            self._admitted += self._queue_times.admit(step.new_rows)
        self._files.read(self.scheduler.kv_cache.disk.take_asked())
        if step is None and self._in_flight is None and self.scheduler.has_work():
            self._wait_for_files()
        try:
            outputs = self._advance(step, meanwhile)
        except StepFailed as failure:
            lost = [d.step for d in (self._in_flight,) if d is not None] + ([step] if step else [])
            outputs = self._recover(lost, failure)
        if outputs is None:
            outputs = StepOutputs(self.scheduler.num_steps)
        outputs.events[:0] = self._events
        self._events = []
        return self._timed(outputs) if outputs.request_ids or outputs.events else None

    def hear(self, news: DiskNews) -> None:
        """What has become of files; ``step`` asks for it."""
        self.scheduler.kv_cache.disk.hear(news)

    def close(self) -> None:
        """Nothing will be computed any more; what is on its way to a file gets there, and what is
        on the device alone gets one, as far as there is time.
        """
        try:
            enabled = self.scheduler.kv_cache.disk.enabled and not self._torn
            if self._keep is not None and enabled:
                self._file_blocks(self._keep)
        finally:
            self._files.close()

    def _file_blocks(self, keep: Callable[[Sequence[tuple[int, bytes]]], None]) -> None:
        self.abort(tuple(self.scheduler.requests))
        self.step()  # takes in what is in flight, and what has become of files
        for blocks in batched(unfiled_blocks(self.scheduler.kv_cache), BLOCKS_AT_ONCE):
            if not self._files.ending():
                return
            keep(blocks)

    def _wait_for_files(self) -> None:
        if not self.scheduler.kv_cache.disk.is_reading:
            raise InvariantError("Requests wait, but none of them can be scheduled.")
        self._files.wait(MAX_WAIT_S)

    def _timed(self, outputs: StepOutputs) -> StepOutputs:
        admitted, self._admitted = self._admitted, []
        num_step_tokens, self._num_step_tokens = self._num_step_tokens, []
        return msgspec.structs.replace(
            outputs,
            timestamp=self._clock.now(),
            admitted=admitted,
            num_step_tokens=num_step_tokens,
        )

    def _advance(
        self, step: SchedulerOutput | None, meanwhile: Callable[[], object] | None
    ) -> StepOutputs | None:
        """Dispatch ``step``, then take in the one before it, or ``step`` itself without a lead."""
        dispatched = self._dispatch(step) if step is not None else None
        if meanwhile is not None:
            meanwhile()
        ahead = self.async_scheduling and not self.recovery.active
        due = self._in_flight if ahead else dispatched
        output = self._fetch(due) if due is not None else None
        self._in_flight = dispatched if ahead else None
        if due is None or output is None:
            return None
        outputs = self.scheduler.update(due.step, output)
        self._num_step_tokens.append(due.step.num_tokens)
        self._num_tokens += due.step.num_tokens
        self._num_token_slots += output.num_token_slots
        self.recovery.advance()
        return outputs

    def _dispatch(self, step: SchedulerOutput) -> Dispatched:
        try:
            check_step(step, self.scheduler.plan)
            now = self._clock.now()
            return Dispatched(step, self.executor.dispatch(step), now)
        except Exception as error:
            raise StepFailed(f"dispatch of step {step.step_id}") from error

    def _fetch(self, due: Dispatched) -> ModelRunnerOutput:
        try:
            output = self.executor.fetch(due.handle)
            check_output(due.step, output, self.scheduler.plan)
            self._note_time(due)
            return output
        except Exception as error:
            raise StepFailed(f"fetch of step {due.step.step_id}") from error

    def _note_time(self, fetched: Dispatched) -> None:
        """The device began the step when it had it and was done with the one before."""
        began, self._fetched = max(fetched.dispatched, self._fetched), self._clock.now()
        if self._latency_target is not None:
            self._latency_target.observe(fetched.step.bucket, self._fetched - began)

    def _recover(self, lost: list[SchedulerOutput], failure: StepFailed) -> StepOutputs:
        """Drop all that was on the device and start over with suspects one at a time.

        Requests of every lost step are suspects: an error may show only when a later step
        is dispatched. What reset() raises is not caught; without it there is no going on.
        """
        logger.error("%s failed, %d steps are lost", failure, len(lost), exc_info=failure.__cause__)
        self._in_flight = None
        self.executor.reset()
        involved = [request_id for step in lost for request_id in step.request_ids]
        return StepOutputs(self.scheduler.num_steps, events=self.recovery.step_failed(involved))
