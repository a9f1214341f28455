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
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.config.plan import EnginePlan
from jaxllm.config.scheduling import SchedulingConfig
from jaxllm.core.block_pool import BlockPool
from jaxllm.core.buckets import pick_bucket, token_budget
from jaxllm.core.commit import commit_step
from jaxllm.core.forced_tokens import KnownTokens, take_forced
from jaxllm.core.invariant import InvariantError
from jaxllm.core.kv_cache_manager import KVCacheManager
from jaxllm.core.making_way import victims_of_waiting
from jaxllm.core.policies import POLICIES
from jaxllm.core.prefill_shares import PrefillShares, shares_of_step
from jaxllm.core.request import FINISHED, Request, RequestStatus
from jaxllm.core.row_table import RowTable
from jaxllm.core.scheduler_output import InFlightStep, NewRow, SchedulerOutput
from jaxllm.core.spans import span_of
from jaxllm.core.sparing import blocks_to_admit, is_spared, rank_in_row
from jaxllm.core.standing_aside import StandingAside
from jaxllm.errors import InvalidRequestError
from jaxllm.messages import EngineCoreOutput, EngineCoreRequest, EngineStats, StepOutputs

if TYPE_CHECKING:
    from jaxllm.engine.executor import ModelRunnerOutput

BlockTableEntry = tuple[int, int, int]  # row, index in its block table, block id


class Scheduler:
    """Admits, advances, preempts and finishes requests. The only one who changes a Request.

    Requests run in the order the policy gives them rows. When blocks run out the newest running
    request of the worst rank is preempted: it leaves its row and waits again, in front of its
    equals, to go on later, in any row, from what is then left of its blocks. So the oldest request
    of the best rank can always advance, and since no request is accepted that the whole pool could
    not hold, every step makes progress.
    """

    def __init__(
        self,
        plan: EnginePlan,
        scheduling: SchedulingConfig | None = None,
        *,
        cache_key: bytes = b"",
    ):
        """``cache_key``: a secret for the hashes of the prefix cache."""
        self.plan = plan
        self.scheduling = scheduling or SchedulingConfig()
        self.token_budget = token_budget(plan)
        self.pool = BlockPool(plan.num_blocks)
        self.kv_cache = KVCacheManager(
            self.pool,
            plan.block_size,
            plan.max_model_len,
            caching=plan.prefix_caching,
            key=cache_key,
            identity=plan.kv_identity,
            host_slots=plan.host_blocks,
            save_all=plan.offloading,
            on_disk=plan.kv_files,
            for_all=plan.prefix_cache_scope == "all",
        )
        self.waiting = POLICIES[self.scheduling.policy](self.scheduling)
        self.rows = RowTable(plan.max_num_seqs, partial(rank_in_row, self.waiting))
        long = self.scheduling.long_prefill_token_threshold or max(1, self.token_budget // 4)
        self.aside = StandingAside(self.kv_cache, self.rows, self.waiting, long)
        self.requests: dict[str, Request] = {}  # every request that is not finished
        self.in_flight: deque[InFlightStep] = deque()
        self.num_preemptions = 0
        self.num_steps = 0
        self.num_corrupted = 0  # requests ended since no token could be drawn for them
        self.forced: list[Request] = []  # with tokens that their rows do not know yet
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
        span = span_of(core_request, self.plan.attention_params)
        request = Request(core_request, next(self._arrivals), self.plan.max_model_len, span)
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
            if self.aside.remove(request.request_id) is None:
                self.waiting.remove(request.request_id)
            self.kv_cache.give_up(request)
        else:
            self._leave_row(request, shared=reason != "error")
        del self.requests[request.request_id]
        request.status = FINISHED[reason]

    def _leave_row(self, request: Request, *, shared: bool = True) -> None:
        """``shared``: others may go on with what it has computed."""
        if request.row is None:
            raise InvariantError(f"Request {request.request_id!r} leaves a row, but has none.")
        if shared:
            num_computed = int(self.rows.num_computed[request.row])
            self.kv_cache.note_computed(request, num_computed, pauses=True)
        else:
            self.kv_cache.forget_contents(request)
        self.rows.leave(request.row)
        self.kv_cache.free(request)
        self._left_rows.append(request.row)
        request.row = None

    def _preempt(self, request: Request) -> None:
        self._leave_row(request)
        self.kv_cache.expect_again(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        request.has_fetched = False
        self.num_preemptions += 1
        self.waiting.prepend(request)

    def preempt_all(self) -> None:
        """Send every running request back to the queue, in front of those that wait."""
        for row in self.rows.running_rows()[::-1]:
            self._preempt(self.rows.request[row])

    def reset(self) -> None:
        """Follow ``Executor.reset()``: no row is known, no step in flight will ever answer."""
        self.preempt_all()
        self.kv_cache.forget_all()
        self.in_flight.clear()
        self._left_rows.clear()

    def isolate(self, request_id: str | None) -> None:
        """Admit this request only, until called with None. Does not touch what runs already."""
        self._only = request_id
        self.aside.clear()

    @property
    def isolating(self) -> bool:
        return self._only is not None

    # One step --------------------------------------------------------------------------------

    def schedule(self, token_limit: int | None = None) -> SchedulerOutput | None:
        """Decide the next step, or None if nothing can be computed before an ``update``.

        Decoding rows come first, then prefills under way, then waiting requests, as long as
        rows, blocks and the step's tokens last.

        Args:
            token_limit: of a step with decoding rows. It never keeps prefills from advancing.
        """
        self.aside.come_back()
        if not self.isolating:
            self.aside.pick()
        if self.waiting.preempts and self._only is None:
            for request in victims_of_waiting(self, self.token_budget):
                self._preempt(request)
        preemptions = self.num_preemptions
        known_tokens = take_forced(self)
        new_blocks = self._grow_rows()
        decoding = self.rows.decoding_rows()
        shares = shares_of_step(self, decoding.size, token_limit)
        chunks = self._continue_prefills(shares)
        new_rows: list[NewRow] = []
        # Admitting in a step that ran out of blocks would bring the victim straight back.
        while shares.left > 0 and preemptions == self.num_preemptions:
            request = self._admit(new_rows, new_blocks, shares.left)
            if request is None or request.row is None:
                break
            num_tokens = self.rows.num_to_prefill(request.row)
            chunk = shares.take(num_tokens, self.rows.least_to_prefill(request.row))
            self._take(request.row, chunk, chunks)
            self.waiting.admitted(request, num_tokens)
        self._share_the_rest(shares, chunks)
        self.waiting.decoded(self.rows.request[decoding])
        if not decoding.size and not chunks:
            return None
        known_tokens = [known for known in known_tokens if self.rows.request[known[0]] is not None]
        return self._build_step(decoding, list(chunks.items()), new_rows, new_blocks, known_tokens)

    def _grow_rows(self) -> list[BlockTableEntry]:
        """Give blocks to each row that begins one; preempt the last in order where none is left.

        Victims never come before the row they are preempted for, and blocks are given in order,
        so no block just given is taken away again in the same step.
        """
        new_blocks: list[BlockTableEntry] = []
        for row in self.rows.crossing_rows().tolist():
            request: Request | None = self.rows.request[row]
            num_computed = int(self.rows.num_computed[row])
            num_tokens = max(num_computed + 1, int(self.rows.prefill_len[row]))
            if request is not None:
                self.kv_cache.note_computed(request, num_computed, pauses=False)
            while request is not None and request.row == row:
                entries = self._allocate(request, num_tokens)
                if entries is not None:
                    new_blocks += entries
                    break
                self._preempt(self.rows.request[self.rows.victims()[0]])
        return new_blocks

    def _allocate(self, request: Request, num_tokens: int) -> list[BlockTableEntry] | None:
        row = request.row
        appended = self.kv_cache.allocate_slots(request, num_tokens)
        if appended is None or row is None:
            return None
        self.rows.capacity[row] += len(appended) * self.plan.block_size
        return [(row, index, block_id) for index, block_id in appended]

    def _continue_prefills(self, shares: PrefillShares) -> dict[int, int]:
        """Next chunks (number of tokens by row) of rows whose prefill is under way.

        They never want blocks: a request gets those of all its known tokens on admission. So a
        prefill, once begun, is not thrown away for lack of room for its own rest.
        """
        chunks: dict[int, int] = {}
        for row in self.rows.prefilling_rows().tolist():
            self._take(row, shares.take(self.rows.num_to_prefill(row)), chunks)
        return chunks

    def _share_the_rest(self, shares: PrefillShares, chunks: dict[int, int]) -> None:
        """What was kept for short prefills and not wanted, for lack of blocks perhaps."""
        if not shares.left:
            return
        for row in self.rows.prefilling_rows().tolist():
            has = chunks.get(row, 0)
            more = shares.take_rest(self.rows.num_to_prefill(row) - has)
            self._take(row, has + more, chunks)

    def _take(self, row: int, num_tokens: int, chunks: dict[int, int]) -> None:
        """The step feeds that many tokens of the row's prefill: others may share them at once."""
        if not num_tokens:
            return
        chunks[row] = num_tokens
        end = int(self.rows.num_computed[row]) + num_tokens
        request, pauses = self.rows.request[row], end == int(self.rows.prefill_len[row])
        self.kv_cache.note_computed(request, end, in_this_step=True, pauses=pauses)

    def _admit(
        self, new_rows: list[NewRow], new_blocks: list[BlockTableEntry], most: int
    ) -> Request | None:
        """Give the next waiting request a row and blocks, if there are and ``most`` tokens do."""
        request = self.next_waiting() if self.rows.num_free else None
        if request is None or self.kv_cache.num_at_once(request) > most:
            return None
        if is_spared(request) and self.pool.num_free < blocks_to_admit(self, request):
            return None
        start = self.kv_cache.begin(request)
        if start is None:
            return None
        self.waiting.remove(request.request_id)
        row = self.rows.join(request, start.num_computed)
        request.row = row
        request.status = RequestStatus.RUNNING
        self.rows.capacity[row] = len(start.entries) * self.plan.block_size
        new_rows.append(NewRow(row, request.core_request, request.token_ids, start.num_computed))
        new_blocks += [(row, index, block_id) for index, block_id in start.entries]
        return request

    def next_waiting(self) -> Request | None:
        """Whose turn it is; those before it that stand aside leave the queue."""
        if self._only is not None:
            request = self.requests.get(self._only)
            return request if request is not None and request.row is None else None
        while len(self.waiting):
            request = self.waiting.peek()
            if not self.aside.takes(request):  # the leader may have begun in this step
                return request
            self.waiting.remove(request.request_id)
        return None

    def _build_step(
        self,
        decoding: np.ndarray,
        chunks: list[tuple[int, int]],
        new_rows: list[NewRow],
        new_blocks: list[BlockTableEntry],
        known_tokens: list[KnownTokens],
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
        moves = self.kv_cache.step_made()
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
            known_tokens=tuple(known_tokens),
            block_saves=tuple(moves.saves),
            block_copies=tuple(moves.copies),
            block_loads=tuple(moves.loads),
            block_writes=tuple(moves.writes),
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
            num_waiting=len(self.waiting) + len(self.aside),
            kv_cache_usage=self.pool.usage,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
            num_corrupted=self.num_corrupted,
            num_prefix_queries=self.kv_cache.num_queried_tokens,
            num_prefix_hits=self.kv_cache.num_hit_tokens,
            num_blocks_saved=self.kv_cache.num_saved_blocks,
            num_blocks_loaded=self.kv_cache.num_loaded_blocks,
            num_blocks_on_file=self.kv_cache.disk.num_stored,
            num_blocks_read=self.kv_cache.disk.num_read,
        )
