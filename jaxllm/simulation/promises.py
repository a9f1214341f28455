"""What policies promise of each step, checked from outside when the step is dispatched."""

from collections.abc import Callable

from jaxllm.core.buckets import lowest_limit
from jaxllm.core.request import Request, RequestStatus
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.core.spans import identity_of
from jaxllm.core.sparing import is_spared
from jaxllm.simulation.violation import require


class Promises:
    """Silent while a failure is looked into: suspects then run out of turn.

    ``last_limit`` tells the token limit that the step was made with.
    """

    def __init__(self, scheduler: Scheduler, last_limit: Callable[[], int | None]):
        self._scheduler, self._last_limit = scheduler, last_limit
        self._policy = scheduler.scheduling.policy
        self._running: dict[str, int] = {}  # priority by id, after the step before
        self._num_preemptions = self._num_aside = 0  # then

    def check(self, step: SchedulerOutput) -> None:
        scheduler = self._scheduler
        new = [scheduler.requests[n.request.request_id] for n in step.new_rows]
        if not scheduler.isolating:
            self._check_turns(new)
            if self._policy == "priority":
                self._check_way_made(new)
            self._check_short_ones(step)
            self._check_limit(step)
            self._check_nothing_twice(step, new)
        self._num_preemptions, self._num_aside = scheduler.num_preemptions, len(scheduler.aside)
        running = (r for r in scheduler.requests.values() if r.row is not None)
        self._running = {r.request_id: r.core_request.priority for r in running}

    def _check_turns(self, new: list[Request]) -> None:
        """Nobody is admitted before one that goes first."""
        place: dict[str, Callable[[Request], int]] = {
            "fcfs": lambda request: request.arrival_index,
            "priority": lambda request: request.core_request.priority,
        }
        if not new or self._policy not in place:
            return
        key = place[self._policy]
        admitted = max(map(key, new))
        first = min(map(key, self._scheduler.waiting), default=admitted)
        require(admitted <= first, "turns", "A request was admitted before a better one.")

    def _check_way_made(self, new: list[Request]) -> None:
        """Who is thrown out in a step that admits makes way for a better one; who should, does."""
        scheduler = self._scheduler
        waiting = [r for r in scheduler.waiting if r.status is RequestStatus.PREEMPTED]
        gone = [self._running[r.request_id] for r in waiting if r.request_id in self._running]
        best = min((r.core_request.priority for r in new), default=None)
        if best is not None and gone:
            require(min(gone) > best, "way", "A request made way for its equal.")
        if not scheduler.rows.num_free and scheduler.num_preemptions == self._num_preemptions:
            # Without a free row the first that waits must be no better than any that runs on.
            first = next(iter(scheduler.waiting), None)
            runs_on = scheduler.rows.request[scheduler.rows.victims()].tolist()
            worst = max((r.core_request.priority for r in runs_on if not is_spared(r)), default=0)
            stays = first is None or is_spared(first) or not runs_on or new
            fits = first is not None and self._fits_alone(first)
            better = first is not None and first.core_request.priority < worst
            require(stays or not fits or not better, "way", "A better request waits for a row.")

    def _fits_alone(self, request: Request) -> bool:
        kv_cache = self._scheduler.kv_cache
        return kv_cache.num_blocks_for(request.num_tokens) <= self._scheduler.pool.num_free

    def _check_short_ones(self, step: SchedulerOutput) -> None:
        """Long prefills take no more than half while a short prompt could begin."""
        scheduler, rows = self._scheduler, self._scheduler.rows
        if self._policy == "fair":  # whose next one is another after the step than before
            return
        threshold = scheduler.scheduling.long_prefill_token_threshold
        first = next(iter(scheduler.waiting), None)
        if threshold is None or first is None or is_spared(first) or not rows.num_free:
            return
        if first.span:
            return  # it begins where there is room for all that sees ahead
        could_begin = first.num_tokens <= threshold and self._fits_alone(first)
        if not could_begin or scheduler.num_preemptions != self._num_preemptions:
            return
        if len(scheduler.aside) > self._num_aside:
            return  # for those a row and tokens were set aside in vain
        if any(new.num_computed for new in step.new_rows):
            return  # a long one before it may have become short: its beginning is being computed
        chunks = slice(step.num_decode_rows, None)
        counts, to_go = (
            step.num_new_tokens[chunks],
            (rows.prefill_len[step.rows] - step.starts)[chunks],
        )
        taken = int(counts[to_go > threshold].sum())
        spans = (scheduler.requests[new.request.request_id].span for new in step.new_rows)
        least = sum(max(1, span) for span in spans)  # tokens that these begin with
        most = int(counts.sum() + 1) // 2 + least
        require(taken <= most, "shares", "Long prefills took it all.")

    def _check_limit(self, step: SchedulerOutput) -> None:
        limit = self._last_limit()
        if limit is not None and step.num_decode_rows:
            least = lowest_limit(self._scheduler.plan.buckets, step.num_decode_rows)
            # What sees ahead is fed whole, whatever the limit.
            ahead = [r.span for r in self._scheduler.requests.values()]
            most = max(limit, least, step.num_decode_rows + max(ahead, default=0))
            require(step.num_tokens <= most, "limit", f"{step.num_tokens} tokens, limit {most}.")

    def _check_nothing_twice(self, step: SchedulerOutput, new: list[Request]) -> None:
        """A long prefill does not begin while another is about to compute the same."""
        scheduler, rows = self._scheduler, self._scheduler.rows
        threshold = scheduler.scheduling.long_prefill_token_threshold
        if threshold is None or not scheduler.plan.prefix_caching or not new:
            return
        chunks = zip(step.rows.tolist(), step.starts.tolist(), strict=True)
        prefills = {row: start for row, start in chunks if start < rows.prefill_len[row]}
        joined = [request.row for request in new]
        for place, request in enumerate(new):
            size, row = scheduler.plan.block_size, request.row
            if row is None or request.owes_prompt_logprobs:
                continue
            begins = prefills[row] - prefills[row] % size
            if request.num_tokens - begins <= threshold:
                continue
            for other in prefills.keys() - set(joined[place:]):
                leader: Request = rows.request[other]
                common = self._num_common(request, leader) // size * size
                worse = rows.rank[other] > rows.rank[row]
                require(worse or common <= begins, "twice", f"{request.request_id} should wait.")

    def _num_common(self, request: Request, leader: Request) -> int:
        one, other = request.core_request, leader.core_request
        scope_all = self._scheduler.plan.prefix_cache_scope == "all"
        if one.cache_salt != other.cache_salt or (one.tenant != other.tenant and not scope_all):
            return 0
        if identity_of(request) != identity_of(leader):
            return 0
        pairs = zip(request.token_ids[:-1], leader.token_ids, strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b),
            min(request.num_tokens - 1, leader.num_tokens),
        )
