"""Counts again, from nothing, everything the scheduler keeps in several places.

Slow (it looks at every block); tests call it after every step.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.core.block_pool import NULL_BLOCK
from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import RequestStatus
from jaxllm.core.row_table import FREE
from jaxllm.core.scheduler_output import SchedulerOutput

if TYPE_CHECKING:
    from jaxllm.core.scheduler import Scheduler


def check_integrity(scheduler: Scheduler, step: SchedulerOutput | None = None) -> None:
    """Check the scheduler, and the step it has just made if one is given.

    Raises:
        InvariantError: something does not add up; the message says what.
    """
    _check_blocks(scheduler)
    _check_rows(scheduler)
    _check_requests(scheduler)
    if step is not None:
        _check_step(scheduler, step)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantError(message)


def _check_blocks(scheduler: Scheduler) -> None:
    pool, kv_cache = scheduler.pool, scheduler.kv_cache
    owned = Counter(chain.from_iterable(kv_cache.tables().values()))
    free = Counter(pool.free_blocks())
    _require(max(free.values(), default=1) == 1, "A block is free twice.")
    _require(not owned.keys() & free.keys(), "A block is both free and owned.")
    _require(NULL_BLOCK not in owned and NULL_BLOCK not in free, "Block 0 is in use.")
    everything = range(1, pool.num_blocks)
    _require(owned.keys() | free.keys() == set(everything), "A block is lost.")
    owners = {block_id: pool.num_owners(block_id) for block_id in everything}
    _require(all(owners[i] == owned[i] for i in everything), "Owners are counted wrongly.")
    _check_sharing(scheduler)


def _check_sharing(scheduler: Scheduler) -> None:
    """Nobody writes into a block that others read: it lies before the first token to compute, or
    its one owner was there first.
    """
    size, seen = scheduler.plan.block_size, dict[int, str]()
    for request in scheduler.requests.values():
        if request.row is None:
            continue
        table = scheduler.kv_cache.block_ids(request)
        num_complete = int(scheduler.rows.num_computed[request.row]) // size
        for index, block_id in enumerate(table):
            if index >= num_complete:
                _require(
                    scheduler.pool.num_owners(block_id) == 1,
                    f"Block {block_id} of {request.request_id!r} is shared before it is complete.",
                )
            elif block_id in seen:
                same = scheduler.requests[seen[block_id]].tokens_between(0, (index + 1) * size)
                mine = request.tokens_between(0, (index + 1) * size)
                _require(np.array_equal(same, mine), f"Block {block_id} is of different tokens.")
            seen[block_id] = request.request_id
    indexed = set(scheduler.kv_cache.prefix.block_ids())
    kept = set(scheduler.pool.kept_blocks())
    _require(indexed == kept, "The pool keeps other blocks than the cache knows.")


def _check_rows(scheduler: Scheduler) -> None:
    table = scheduler.rows
    free = table.free_rows()
    running = [(r.row, r) for r in scheduler.requests.values() if r.row is not None]
    used = [row for row, _ in running]
    _require(sorted([*free, *used]) == list(range(table.num_rows)), "Rows do not add up.")
    _require(all(table.tenancy[row] == FREE for row in free), "A free row has a tenant.")
    tenancies = table.tenancy[used]
    _require(len(set(tenancies.tolist())) == len(used), "Two rows have the same tenancy.")
    for row, request in running:
        _require(table.request[row] is request, f"Row {row} is not {request.request_id!r}'s.")
        computed, prefill_len = int(table.num_computed[row]), int(table.prefill_len[row])
        _require(table.final_len[row] == request.final_len, "final_len differs.")
        _require(table.arrival[row] == request.arrival_index, "arrival differs.")
        _require(table.rank[row] == scheduler.waiting.rank(request), "rank differs.")
        _require(table.needs_events[row] == request.needs_events, "needs_events differs.")
        _require(0 <= computed <= request.max_computed_tokens, "Computed beyond the last token.")
        num_blocks = len(scheduler.kv_cache.block_ids(request))
        needed = scheduler.kv_cache.num_blocks_for(max(computed, prefill_len))
        _require(num_blocks == needed, f"{num_blocks} blocks where {needed} are needed.")
        _require(table.capacity[row] == num_blocks * scheduler.plan.block_size, "capacity differs.")
        in_flight = table.num_in_flight(row)
        _require(0 <= in_flight <= len(scheduler.in_flight), f"{in_flight} tokens in flight.")


def _check_requests(scheduler: Scheduler) -> None:
    waiting = list(scheduler.waiting)
    running = [r for r in scheduler.requests.values() if r.row is not None]
    names = sorted(r.request_id for r in chain(waiting, running))
    _require(names == sorted(scheduler.requests), "A request is lost, or in two places.")
    _require(
        scheduler.kv_cache.tables().keys() == {r.request_id for r in running},
        "Blocks are held by others than the running requests.",
    )
    for request in waiting:
        expected = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        _require(request.status is expected, f"A waiting request is {request.status}.")
    for request in running:
        _require(request.status is RequestStatus.RUNNING, f"A running request is {request.status}.")
    for request in scheduler.requests.values():
        room = request.max_output_tokens - len(request.output_token_ids)
        _require(room > 0 or request.max_output_tokens == 0, "A request should have ended.")


def _check_step(scheduler: Scheduler, step: SchedulerOutput) -> None:
    _require(step.bucket in scheduler.plan.buckets, f"{step.bucket} is not a bucket of the plan.")
    _require(step.num_tokens <= scheduler.token_budget, "The step exceeds the token budget.")
    _require(len(np.unique(step.rows)) == step.rows.size > 0, "A row is scheduled twice, or none.")
    fed_by_device = step.num_new_tokens[: step.num_decode_rows]
    _require(bool((fed_by_device == 1).all()), "A decode row feeds other than one token.")
    table = scheduler.rows
    _require(bool((table.tenancy[step.rows] != FREE).all()), "A free row is scheduled.")
    ends = step.starts + step.num_new_tokens
    _require(bool((ends <= table.capacity[step.rows]).all()), "A token has no block to go to.")
