"""Tokens that a grammar, or the end of thoughts, leaves no choice about: known without sampling.

Taken in with the token before them, they are fed like the rest of a prompt, several in one step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.core.request import Request
from jaxllm.core.stop import check_stop

if TYPE_CHECKING:
    from jaxllm.core.scheduler import Scheduler

KnownTokens = tuple[int, int, tuple[int, ...]]  # row, position of the first, token ids


def append_forced(request: Request, forced: tuple[int, ...]) -> tuple[int, ...]:
    """Append to the output, behind the token just sampled, as many as come before its end. What
    was appended.
    """
    if check_stop(request) is not None:
        return ()
    for count, token_id in enumerate(forced, 1):
        if request.append(token_id) and check_stop(request) is not None:
            return forced[:count]
    return forced


def take_forced(scheduler: Scheduler) -> list[KnownTokens]:
    """Let rows feed what has become known since the last step: from now on it is due like a
    prefill. A request that has left its row finds it among its tokens when it returns.
    """
    forced, scheduler.forced = scheduler.forced, []
    known: list[KnownTokens] = []
    for request in forced:
        if request.row is None:
            continue
        start = int(scheduler.rows.num_computed[request.row])
        scheduler.rows.prefill_len[request.row] = request.num_tokens
        tokens = tuple(request.tokens_between(start, request.num_tokens).tolist())
        known.append((request.row, start, tokens))
        scheduler.waiting.decoded([request] * len(tokens))
    return known
