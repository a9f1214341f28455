"""Continuous batching: which requests compute how many tokens in the next step.

Owns requests, rows and blocks, and is a pure state machine: no clock, no threads, no random
numbers, no JAX. Whatever it decides follows from the calls made to it and can be replayed.

The device may lag behind by a step (``schedule`` for step N+1 comes before ``update`` of step N).
Three rules make that safe:

1. The device runs steps in the order of dispatch, on one KV cache. So rows and blocks are free
   for others as soon as their owner left, without waiting for steps in flight: a later step
   overwrites them only after an earlier one has read or written them.
2. A result counts only for the tenancy of the row that the step was scheduled for. What arrives
   for a request that has left meanwhile (finished, aborted, preempted) is dropped.
3. A token dropped so from a preempted request is sampled again after the request resumed from
   what was fetched. Sampling depends on the seed and the position alone, so it is the same token.
   Keeping it instead would let a request finish while it waits, for one token saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.config.plan import EnginePlan
from jaxllm.core.block_pool import BlockPool
from jaxllm.core.buckets import pick_bucket, token_budget, tokens_to_feed
from jaxllm.core.commit import commit_step
from jaxllm.core.invariant import InvariantError
from jaxllm.core.kv_cache_manager import KVCacheManager
from jaxllm.core.request import FINISHED, Request, RequestStatus
from jaxllm.core.request_queue import POLICIES
from jaxllm.core.row_table import RowTable
from jaxllm.core.scheduler_output import NewRow, SchedulerOutput
from jaxllm.errors import InvalidRequestError
from jaxllm.messages import EngineCoreOutput, EngineCoreRequest, EngineStats, StepOutputs

if TYPE_CHECKING:
    from jaxllm.engine.executor import ModelRunnerOutput

BlockTableEntry = tuple[int, int, int]  # row, index in its block table, block id


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """What must be remembered of a step until its results are here."""

    step_id: int
    tenancies: np.ndarray  # int64 [n], aligned with the rows of the step


class Scheduler:
    """Admits, advances, preempts and finishes requests. The only one who changes a Request.

    Requests run in the order the policy gives them rows. When blocks run out the newest running
    request is preempted: it leaves its row and waits again, in front of all others, to be
    computed anew (prompt and output) in a row of its own choosing later. So the oldest request
    can always advance, and since no request is accepted that the whole pool could not hold,
    every step makes progress.
    """

    def __init__(self, plan: EnginePlan, policy: str = "fcfs"):
        self.plan = plan
        self.token_budget = token_budget(plan)
        self.pool = BlockPool(plan.num_blocks)
        self.kv_cache = KVCacheManager(self.pool, plan.block_size, plan.max_model_len)
        self.rows = RowTable(plan.max_num_seqs)
        self.waiting = POLICIES[policy]()
        self.requests: dict[str, Request] = {}  # every request that is not finished
        self.in_flight: deque[InFlightStep] = deque()
        self.num_preemptions = 0
        self.num_steps = 0
        self.num_corrupted = 0  # requests ended since no token could be drawn for them
        self._arrivals = count()
        self._left_rows: list[int] = []  # since the last step
        self._only: str | None = None  # see isolate()

    # A request's life ------------------------------------------------------------------------

    def add_request(self, core_request: EngineCoreRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: its id is in use, or the KV cache could not hold it even alone.
        """
        if core_request.request_id in self.requests:
            raise InvalidRequestError(
                f"Request id {core_request.request_id!r} is in use.", param="request_id"
            )
        request = Request(core_request, next(self._arrivals), self.plan.max_model_len)
        if not self.kv_cache.can_ever_hold(request.max_computed_tokens):
            room = self.pool.num_usable * self.plan.block_size
            raise InvalidRequestError(
                f"Prompt ({request.num_prompt_tokens} tokens) and max_tokens "
                f"({core_request.max_tokens}) need more than the {room} tokens that the KV cache "
                "holds. Ask for fewer tokens or start the engine with a larger KV cache.",
                param="max_tokens",
            )
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def abort(self, request_ids: Iterable[str]) -> list[EngineCoreOutput]:
        """End requests at once, wherever they are. Unknown ids are ignored."""
        known = [self.requests[i] for i in dict.fromkeys(request_ids) if i in self.requests]
        for request in known:
            self.finish(request, "abort")
        return [EngineCoreOutput(request.request_id, finish_reason="abort") for request in known]

    def fail(self, request_id: str, error: str) -> list[EngineCoreOutput]:
        """End a request with an error. An unknown id is ignored."""
        if request_id not in self.requests:
            return []
        self.finish(self.requests[request_id], "error")
        return [EngineCoreOutput(request_id, finish_reason="error", error=error)]

    def finish(self, request: Request, reason: str) -> None:
        """Let a request leave for good. Telling its client is the caller's part."""
        if request.row is None:
            self.waiting.remove(request.request_id)
        else:
            self._leave_row(request)
        del self.requests[request.request_id]
        request.status = FINISHED[reason]

    def _leave_row(self, request: Request) -> None:
        if request.row is None:
            raise InvariantError(f"Request {request.request_id!r} leaves a row, but has none.")
        self.rows.leave(request.row)
        self.kv_cache.free(request)
        self._left_rows.append(request.row)
        request.row = None

    def _preempt(self, request: Request) -> None:
        self._leave_row(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.prepend(request)

    def preempt_all(self) -> None:
        """Send every running request back to the queue, the oldest in front."""
        for row in self.rows.running_rows()[::-1]:
            self._preempt(self.rows.request[row])

    def reset(self) -> None:
        """Follow ``Executor.reset()``: no row is known, no step in flight will ever answer."""
        self.preempt_all()
        self.in_flight.clear()
        self._left_rows.clear()

    def isolate(self, request_id: str | None) -> None:
        """Admit this request only, until called with None. Does not touch what runs already."""
        self._only = request_id

    @property
    def isolating(self) -> bool:
        return self._only is not None

    # One step --------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Decide the next step, or None if nothing can be computed before an ``update``.

        Decoding rows come first, then prefills under way, then waiting requests, as long as
        rows, blocks and the step's tokens last.
        """
        preemptions = self.num_preemptions
        new_blocks = self._grow_decoding_rows()
        decoding = self.rows.decoding_rows()
        budget = self._prefill_budget(decoding.size)
        chunks = self._continue_prefills(budget)
        budget -= sum(num_tokens for _, num_tokens in chunks)
        new_rows: list[NewRow] = []
        # Admitting in a step that had to preempt would bring the victim straight back.
        while budget > 0 and preemptions == self.num_preemptions:
            request = self._admit(new_rows, new_blocks)
            if request is None or request.row is None:
                break
            num_tokens = min(request.num_tokens, budget)
            chunks.append((request.row, num_tokens))
            budget -= num_tokens
        if not decoding.size and not chunks:
            return None
        return self._build_step(decoding, chunks, new_rows, new_blocks)

    def _prefill_budget(self, num_decode: int) -> int:
        """Prefill tokens of this step: what is wanted, cut to fill a program rather than pad one.
        Blocks may turn out to hold less.
        """
        wanted, most = num_decode, self.token_budget
        for row in self.rows.prefilling_rows().tolist():
            wanted += int(self.rows.prefill_len[row] - self.rows.num_computed[row])
        for request in islice(self.waiting, self.rows.num_free):
            if wanted >= most:
                break
            wanted += request.num_tokens
        return tokens_to_feed(self.plan.buckets, min(wanted, most), num_decode) - num_decode

    def _grow_decoding_rows(self) -> list[BlockTableEntry]:
        """Give a block to each row that begins one; preempt the newest where none is left.

        Victims are never older than the row they are preempted for, and blocks are given to the
        oldest first, so no block just given is taken away again in the same step.
        """
        new_blocks: list[BlockTableEntry] = []
        for row in self.rows.crossing_rows().tolist():
            request: Request | None = self.rows.request[row]
            while request is not None and request.row == row:
                entries = self._allocate(request, int(self.rows.num_computed[row]) + 1)
                if entries is not None:
                    new_blocks += entries
                    break
                self._preempt(self.rows.request[self.rows.newest_unfinished()])
        return new_blocks

    def _allocate(self, request: Request, num_tokens: int) -> list[BlockTableEntry] | None:
        row = request.row
        appended = self.kv_cache.allocate_slots(request, num_tokens)
        if appended is None or row is None:
            return None
        self.rows.capacity[row] += len(appended) * self.plan.block_size
        return [(row, index, block_id) for index, block_id in appended]

    def _continue_prefills(self, budget: int) -> list[tuple[int, int]]:
        """Next chunks (row, number of tokens) of rows whose prefill is under way.

        They never want blocks: a request gets those of all its known tokens on admission. So a
        prefill, once begun, is not thrown away for lack of room for its own rest.
        """
        chunks: list[tuple[int, int]] = []
        for row in self.rows.prefilling_rows().tolist():
            num_tokens = min(int(self.rows.prefill_len[row] - self.rows.num_computed[row]), budget)
            if num_tokens <= 0:
                break
            chunks.append((row, num_tokens))
            budget -= num_tokens
        return chunks

    def _admit(self, new_rows: list[NewRow], new_blocks: list[BlockTableEntry]) -> Request | None:
        """Give the next waiting request a row and blocks for all its known tokens, if there are."""
        request = self._next_waiting()
        if request is None or not self.rows.num_free:
            return None
        appended = self.kv_cache.allocate_slots(request, request.num_tokens)
        if appended is None:
            return None
        self.waiting.remove(request.request_id)
        row = self.rows.join(request)
        request.row = row
        request.status = RequestStatus.RUNNING
        self.rows.capacity[row] = len(appended) * self.plan.block_size
        new_rows.append(NewRow(row, request.core_request, request.token_ids))
        new_blocks += [(row, index, block_id) for index, block_id in appended]
        return request

    def _next_waiting(self) -> Request | None:
        if self._only is not None:
            request = self.requests.get(self._only)
            return request if request is not None and request.row is None else None
        return self.waiting.peek() if len(self.waiting) else None

    def _build_step(
        self,
        decoding: np.ndarray,
        chunks: list[tuple[int, int]],
        new_rows: list[NewRow],
        new_blocks: list[BlockTableEntry],
    ) -> SchedulerOutput:
        table = self.rows
        rows = decoding.astype(np.int32)
        num_new_tokens = np.ones(rows.size, np.int32)
        if chunks:
            chunk_rows, chunk_tokens = np.array(chunks, np.int32).T
            rows = np.concatenate((rows, chunk_rows))
            num_new_tokens = np.concatenate((num_new_tokens, chunk_tokens))
        starts = table.num_computed[rows]
        ends = starts + num_new_tokens
        table.num_computed[rows] = ends
        # A row samples once all known tokens are fed, unless it may have none (max_tokens=0).
        samples = (ends >= table.prefill_len[rows]) & (table.final_len[rows] > ends)
        num_tokens = int(num_new_tokens.sum())
        step = SchedulerOutput(
            step_id=self.num_steps,
            bucket=pick_bucket(self.plan.buckets, num_tokens, rows.size, num_tokens == rows.size),
            rows=rows,
            starts=starts,
            num_new_tokens=num_new_tokens,
            samples=samples,
            num_decode_rows=decoding.size,
            new_rows=tuple(new_rows),
            new_blocks=tuple(new_blocks),
            finished_rows=tuple(self._left_rows),
            request_ids=tuple(table.request_id[rows].tolist()),
        )
        self.num_steps += 1
        self._left_rows.clear()
        self.in_flight.append(InFlightStep(step.step_id, table.tenancy[rows]))
        return step

    def update(self, step: SchedulerOutput, output: ModelRunnerOutput) -> StepOutputs:
        """Take in the results of the oldest step in flight; what is to be told to clients."""
        if not self.in_flight or not self.in_flight[0].step_id == step.step_id == output.step_id:
            raise InvariantError(f"Results of step {output.step_id} are not the ones due now.")
        record = self.in_flight.popleft()
        live = self.rows.tenancy[step.rows] == record.tenancies
        return commit_step(self, step, output, live)

    # What others may know --------------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self.requests)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self.rows.num_running,
            num_waiting=len(self.waiting),
            kv_cache_usage=self.pool.usage,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
            num_corrupted=self.num_corrupted,
        )
