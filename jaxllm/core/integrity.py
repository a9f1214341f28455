"""Counts again, from nothing, everything the scheduler keeps in several places.

Slow where there are many blocks (it looks at every one); tests and simulations call it every step.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from jaxllm.core.block_pool import NULL_BLOCK
from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import RequestStatus
from jaxllm.core.row_table import FREE
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.core.sparing import rank_in_row

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
    owners, free = [0] * pool.num_blocks, list(pool.free_blocks())
    for block_id in chain.from_iterable(kv_cache.tables().values()):
        owners[block_id] += 1
    _require(owners == pool.owners(), "The owners of a block are counted wrongly.")
    _require(len(free) == len(set(free)), "A block is free twice.")
    _require(not any(owners[block_id] for block_id in free), "A block is both free and owned.")
    _require(not owners[NULL_BLOCK] and NULL_BLOCK not in free, "Block 0 is in use.")
    num_owned = pool.num_blocks - owners.count(0)
    _require(len(free) + num_owned == pool.num_usable, "A block is lost.")
    kept = set(pool.kept_blocks())
    _require(kept == kv_cache.prefix.block_ids(), "The pool keeps what the cache does not know.")
    slots = [*kv_cache.host.slots(), *kv_cache.disk.reading().values()]
    _require(sorted(slots) == list(range(kv_cache.host.num_slots)), "Slots do not add up.")
    if num_owned and max(owners) > 1:
        _check_sharing(scheduler, owners)


def _check_sharing(scheduler: Scheduler, owners: list[int]) -> None:
    """Nobody writes into a block that others read, and all have the same tokens in it."""
    size, tokens = scheduler.plan.block_size, dict[int, list[int]]()
    for request in scheduler.requests.values():
        if request.row is None:
            continue
        num_complete = int(scheduler.rows.num_computed[request.row]) // size
        for index, block_id in enumerate(scheduler.kv_cache.block_ids(request)):
            if owners[block_id] == 1:
                continue
            _require(index < num_complete, f"Block {block_id} is shared before it is complete.")
            mine = request.tokens_between(0, (index + 1) * size).tolist()
            _require(tokens.setdefault(block_id, mine) == mine, f"Block {block_id} is another's.")


def _check_rows(scheduler: Scheduler) -> None:
    table = scheduler.rows
    free = table.free_rows()
    running = [r for r in scheduler.requests.values() if r.row is not None]
    used = [r.row for r in running if r.row is not None]
    _require(sorted([*free, *used]) == list(range(table.num_rows)), "Rows do not add up.")
    tenancies = table.tenancy.tolist()
    _require(all(tenancies[row] == FREE for row in free), "A free row has a tenant.")
    _require(len({tenancies[row] for row in used}) == len(used), "Two rows have one tenancy.")
    tables, block_size = scheduler.kv_cache.tables(), scheduler.plan.block_size
    columns = (table.final_len, table.arrival, table.needs_events, table.num_computed)
    final_len, arrival, needs_events, num_computed = (column.tolist() for column in columns)
    prefill_len, capacity = table.prefill_len.tolist(), table.capacity.tolist()
    for row in free:
        left = num_computed[row] or prefill_len[row] or final_len[row] or capacity[row]
        _require(not left and table.request[row] is None, "A free row is not empty.")
    for row, request in zip(used, running, strict=True):
        if table.request[row] is not request or table.request_id[row] != request.request_id:
            raise InvariantError(f"Row {row} is not {request.request_id!r}'s.")
        copied = final_len[row], arrival[row], needs_events[row]
        own = request.final_len, request.arrival_index, request.needs_events
        if copied != own:
            raise InvariantError(f"final_len, arrival, needs_events: {copied} instead of {own}.")
        if table.rank[row] != rank_in_row(scheduler.waiting, request):
            raise InvariantError("rank differs.")
        computed, num_blocks = num_computed[row], len(tables.get(request.request_id, ()))
        if not 0 <= computed <= request.max_computed_tokens:
            raise InvariantError("Computed beyond the last token.")
        needed = scheduler.kv_cache.num_blocks_for(max(computed, prefill_len[row]))
        if num_blocks != needed or capacity[row] != num_blocks * block_size:
            raise InvariantError(
                f"{num_blocks} blocks for {capacity[row]} tokens, where {needed} are needed."
            )
        least = -len(request.output_token_ids) if request in scheduler.forced else 0
        if not least <= table.num_in_flight(row) <= len(scheduler.in_flight):
            raise InvariantError(f"{table.num_in_flight(row)} tokens in flight.")


def _check_requests(scheduler: Scheduler) -> None:
    queued = [*scheduler.waiting, *scheduler.aside]
    waiting = {r.request_id: r for r in queued}
    running = {r.request_id for r in scheduler.requests.values() if r.row is not None}
    disjoint = len(waiting) == len(queued) and not waiting.keys() & running
    complete = waiting.keys() | running == scheduler.requests.keys()
    _require(disjoint and complete, "A request is lost, or in two places.")
    _require(
        scheduler.kv_cache.tables().keys() == running,
        "Blocks are held by others than the running requests.",
    )
    for request in waiting.values():
        expected = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        if request.status is not expected:
            raise InvariantError(f"A waiting request is {request.status}.")
    for request in scheduler.requests.values():
        if request.row is not None and request.status is not RequestStatus.RUNNING:
            raise InvariantError(f"A running request is {request.status}.")
        room = request.max_output_tokens - len(request.output_token_ids)
        _require(room > 0 or request.max_output_tokens == 0, "A request should have ended.")


def _check_step(scheduler: Scheduler, step: SchedulerOutput) -> None:
    if step.bucket not in scheduler.plan.buckets:
        raise InvariantError(f"{step.bucket} is not a bucket of the plan.")
    rows, counts = step.rows.tolist(), step.num_new_tokens.tolist()
    _require(sum(counts) <= scheduler.token_budget, "The step exceeds the token budget.")
    _require(len(set(rows)) == len(rows) > 0, "A row is scheduled twice, or none.")
    fed_by_device = counts[: step.num_decode_rows]
    _require(fed_by_device.count(1) == len(fed_by_device), "A decode row feeds other than 1 token.")
    table = scheduler.rows
    for row, start, count in zip(rows, step.starts.tolist(), counts, strict=True):
        _require(table.tenancy[row] != FREE, "A free row is scheduled.")
        _require(start + count <= table.capacity[row], "A token has no block to go to.")
