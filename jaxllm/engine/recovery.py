"""Finds the request that makes steps fail, so that the others survive. Knows no executor.

After a failed step everything on the device is lost, and every request of that step is suspect.
Suspects then run alone, each until it has got past the point of the failure. A request whose steps
fail twice while it runs alone is the culprit and ends with an error. Nothing else runs meanwhile.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxllm.core.scheduler import Scheduler
from jaxllm.messages import EngineCoreOutput

MAX_FAILURES_ALONE = 2
FAILED_ALONE = "The model could not compute this request; it failed repeatedly while running alone."


@dataclass(slots=True)
class Suspect:
    request_id: str
    cleared_at: int  # num_tokens at which everything scheduled before the failure was done again
    failures_alone: int = 0


class Recovery:
    """Steers the scheduler after failures, by ``isolate``. Inactive as long as nothing fails.

    A fault that needs company (memory that is short for a large batch only) clears every suspect
    and may strike again, but each round gives each suspect a token, so it ends all the same.
    """

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._suspects: list[Suspect] = []  # the last one is running

    @property
    def active(self) -> bool:
        return bool(self._suspects)

    def step_failed(self, request_ids: Iterable[str]) -> list[EngineCoreOutput]:
        """Steps with these requests failed and the executor was reset. Last outputs of culprits."""
        involved = [i for i in dict.fromkeys(request_ids) if i in self._scheduler.requests]
        goals = {i: self._goal(i) for i in involved}
        self._scheduler.reset()
        known = {suspect.request_id: suspect for suspect in self._suspects}
        for request_id in involved:
            if request_id not in known:
                known[request_id] = Suspect(request_id, goals[request_id])
        # Newest last: it runs first and is put back in front of the queue, older ones before it.
        self._suspects = sorted(known.values(), key=self._arrival)
        events = self._blame(known[involved[0]]) if len(involved) == 1 else []
        self._isolate_next()
        return events

    def advance(self) -> None:
        """After a good step or an abort: the next suspect's turn if this one is through or gone."""
        if not self._suspects:
            return
        suspect = self._suspects[-1]
        request = self._scheduler.requests.get(suspect.request_id)
        if request is not None and request.num_tokens < suspect.cleared_at:
            return
        self._suspects.pop()
        if self._suspects:
            self._scheduler.preempt_all()  # the next one is to run alone, too
        self._isolate_next()

    def _goal(self, request_id: str) -> int:
        request = self._scheduler.requests[request_id]
        rows = self._scheduler.rows
        computed = 0 if request.row is None else int(rows.num_computed[request.row])
        return max(request.num_tokens, computed) + 1

    def _arrival(self, suspect: Suspect) -> int:
        request = self._scheduler.requests.get(suspect.request_id)
        return request.arrival_index if request is not None else -1

    def _blame(self, suspect: Suspect) -> list[EngineCoreOutput]:
        suspect.failures_alone += 1
        if suspect.failures_alone < MAX_FAILURES_ALONE:
            return []
        self._suspects.remove(suspect)
        return self._scheduler.fail(suspect.request_id, FAILED_ALONE)

    def _isolate_next(self) -> None:
        """Let the last suspect run that is still there; all, when none is left."""
        while self._suspects and self._suspects[-1].request_id not in self._scheduler.requests:
            self._suspects.pop()
        self._scheduler.isolate(self._suspects[-1].request_id if self._suspects else None)
