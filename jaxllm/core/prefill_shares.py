"""How prefills share the tokens of a step, so that short prompts need not wait for long ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from jaxllm.core.buckets import lowest_limit, tokens_to_feed

if TYPE_CHECKING:
    from jaxllm.core.scheduler import Scheduler


@dataclass(slots=True)
class PrefillShares:
    """Tokens of a step's prefills, taken in the order in which the requests have their turn.

    Short prefills take what they want. Long ones leave them room, up to half of the step; what
    then nobody wants is theirs.
    """

    left: int  # tokens that nobody has taken
    threshold: int  # a prefill with more tokens to go is long
    left_for_long: int

    @classmethod
    def of(cls, budget: int, threshold: int, wanted_by_short: int) -> PrefillShares:
        return cls(budget, threshold, budget - min(wanted_by_short, budget // 2))

    def take(self, num_tokens: int, at_least: int = 0) -> int:
        """A chunk of a prefill that has ``num_tokens`` to go."""
        if num_tokens <= self.threshold:
            chunk = min(num_tokens, self.left)
        else:
            chunk = min(num_tokens, self.left, max(self.left_for_long, at_least))
            self.left_for_long -= chunk
        self.left -= chunk
        return chunk

    def take_rest(self, num_tokens: int) -> int:
        """More for a prefill that has ``num_tokens`` to go, after all had their turn."""
        chunk = min(num_tokens, self.left)
        self.left -= chunk
        return chunk


def shares_of_step(scheduler: Scheduler, num_decode: int, token_limit: int | None) -> PrefillShares:
    """Prefill tokens of a step beside ``num_decode`` decoding rows: what is wanted, cut to fill a
    program rather than pad one. Blocks may turn out to hold less.
    """
    buckets, rows, kv_cache = scheduler.plan.buckets, scheduler.rows, scheduler.kv_cache
    most = scheduler.token_budget
    if num_decode and token_limit is not None:
        most = min(most, max(token_limit, lowest_limit(buckets, num_decode)))
    threshold = scheduler.scheduling.long_prefill_token_threshold or max(1, most // 4)
    wanted, short = num_decode, 0
    under_way = map(rows.num_to_prefill, rows.prefilling_rows().tolist())
    waiting = (
        request.num_tokens - kv_cache.num_cached_tokens(request)
        for request in islice(scheduler.waiting, rows.num_free)
    )
    for num_tokens in chain(under_way, waiting):
        wanted += num_tokens
        short += num_tokens if num_tokens <= threshold else 1  # to begin with
        if wanted >= most <= 2 * short:
            break
    fed = tokens_to_feed(buckets, min(wanted, most), num_decode)
    return PrefillShares.of(fed - num_decode, threshold, short)
