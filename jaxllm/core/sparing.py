"""Who was preempted often is spared: it runs to its end, whoever else wants its blocks.

Without a bound, a request that is always the newest to run could be thrown out again and again
where the pool is much too small, and each time some of its tokens are computed anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.core.policies import SchedulingPolicy
from jaxllm.core.request import Request

if TYPE_CHECKING:
    from jaxllm.core.scheduler import Scheduler

MAX_PREEMPTIONS = 8
SPARED = -(2**63)  # better than any rank of a policy


def is_spared(request: Request) -> bool:
    return request.num_preemptions >= MAX_PREEMPTIONS


def rank_in_row(policy: SchedulingPolicy, request: Request) -> int:
    """The policy's, save for who is spared: while it runs everybody else is preempted first. It
    waits as any other, so it never makes better ones leave.
    """
    return SPARED if is_spared(request) else policy.rank(request)


def blocks_to_admit(scheduler: Scheduler, request: Request) -> int:
    """How many blocks should be free for a waiting request.

    Who is spared begins when all that it will ever need is there, beside what others that are
    spared still need: or these would throw out each other.
    """
    kv_cache = scheduler.kv_cache
    if not is_spared(request):
        return kv_cache.num_blocks_for(request.num_tokens)
    running: list[Request] = scheduler.rows.request[scheduler.rows.running_rows()].tolist()
    return sum(
        kv_cache.num_blocks_for(r.max_computed_tokens) - len(kv_cache.block_ids(r))
        for r in (request, *filter(is_spared, running))
    )
