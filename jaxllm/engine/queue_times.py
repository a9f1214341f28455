"""How long requests wait for their first place in the batch. The scheduler itself has no clock."""

from collections.abc import Iterable

from jaxllm.core.scheduler_output import NewRow
from jaxllm.engine.clock import Clock
from jaxllm.messages import Admission


class QueueTimes:
    """Remembers when each waiting request came. One that was preempted has waited already."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._queued_ts: dict[str, float] = {}

    def add(self, request_id: str) -> None:
        self._queued_ts[request_id] = self._clock.now()

    def forget(self, request_ids: Iterable[str]) -> None:
        """They ended; unknown ids are ignored."""
        for request_id in request_ids:
            self._queued_ts.pop(request_id, None)

    def admit(self, new_rows: Iterable[NewRow]) -> list[Admission]:
        """Those of them that are scheduled for the first time, now."""
        now = self._clock.now()
        admitted: list[Admission] = []
        for new in new_rows:
            queued_ts = self._queued_ts.pop(new.request.request_id, None)
            if queued_ts is not None:
                request_id, num_cached = new.request.request_id, new.num_computed
                admitted.append(Admission(request_id, queued_ts, now, num_cached))
        return admitted
