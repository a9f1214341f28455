"""Who makes way for waiting requests of better rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.core.request import Request
from jaxllm.core.sparing import blocks_to_admit, rank_in_row

if TYPE_CHECKING:
    from jaxllm.core.scheduler import Scheduler


def victims_of_waiting(scheduler: Scheduler, num_tokens: int) -> list[Request]:
    """Running requests to preempt so that waiting ones of better rank get row and blocks.

    The worst goes first, of equals the newest; nobody goes for a request that would not fit even
    then, nor for more of them than ``num_tokens`` prefill tokens serve, nor for one that would only
    stand aside: it does so now.
    """
    standing: list[Request] = []
    victims = _victims(scheduler, num_tokens, standing)
    for request in standing:
        scheduler.waiting.remove(request.request_id)
    return victims


def _victims(scheduler: Scheduler, num_tokens: int, standing: list[Request]) -> list[Request]:
    rows, kv_cache = scheduler.rows, scheduler.kv_cache
    num_rows, num_blocks = rows.num_free, scheduler.pool.num_free
    candidates: list[Request] = rows.request[rows.victims()[::-1]].tolist()  # the worst is last
    policy = scheduler.waiting
    victims: list[Request] = []
    for request in scheduler.waiting:
        wanted = blocks_to_admit(scheduler, request)
        going: list[Request] = []
        if (not num_rows or num_blocks < wanted) and scheduler.aside.takes(request):
            standing.append(request)
            continue
        while not num_rows or num_blocks < wanted:
            if not candidates or rank_in_row(policy, candidates[-1]) <= policy.rank(request):
                return victims
            going.append(candidates.pop())
            num_rows += 1
            num_blocks += len(kv_cache.block_ids(going[-1]))
        victims += going
        num_rows -= 1
        num_blocks -= wanted
        num_tokens -= request.num_tokens
        if num_tokens <= 0:
            break
    return victims
