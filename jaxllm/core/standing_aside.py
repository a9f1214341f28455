"""Who stands aside: requests whose turn has come while what they need is being computed or read."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.core.kv_cache_manager import KVCacheManager
from jaxllm.core.policies import SchedulingPolicy
from jaxllm.core.request import Request
from jaxllm.core.row_table import RowTable

READ_AHEAD = 4  # requests whose files are read while there is no row for them


class StandingAside:
    """Requests that have left the queue and have no row yet; they come back in front of it.

    Whoever shares the beginning of its prompt with a prefill under way waits until that prefill
    has got so far, instead of computing the same beside it. It never waits for one of worse rank,
    nor for one that has left its row.

    Whose beginning is on file waits until it has been read, once.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        rows: RowTable,
        waiting: SchedulingPolicy,
        threshold: int,
    ):
        """Who has no more than ``threshold`` tokens to compute computes them."""
        self._threshold = threshold
        self._kv_cache = kv_cache
        self._rows = rows
        self._waiting = waiting
        self._requests: dict[str, Request] = {}
        self._leaders: dict[str, tuple[Request, int]] = {}  # and how far it must have got, tokens

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def pick(self) -> None:
        """Let those stand aside that should, among the first for whom there are rows."""
        num_rows, taken = self._rows.num_free, list[Request]()
        if self._kv_cache.disk.enabled:
            num_rows = max(num_rows, READ_AHEAD)
        for request in self._waiting if num_rows else ():
            if self.takes(request):
                taken.append(request)
                continue
            num_rows -= 1
            if not num_rows:
                break
        for request in taken:
            self._waiting.remove(request.request_id)

    def takes(self, request: Request) -> bool:
        """Whether a waiting request stands aside from now on; who asks takes it from the queue."""
        if not request.has_fetched and self._kv_cache.fetch(request):
            request.has_fetched = True
        else:
            found = self._leader_of(request)
            if found is None:
                return False
            self._leaders[request.request_id] = found
        self._requests[request.request_id] = request
        return True

    def _leader_of(self, request: Request) -> tuple[Request, int] | None:
        num_cached = self._kv_cache.num_cached_tokens(request)
        if request.num_tokens - num_cached <= self._threshold:
            return None
        rows = self._rows
        for row in rows.prefilling_rows().tolist():
            leader: Request = rows.request[row]
            num_common = self._kv_cache.num_common_tokens(request, leader)
            if num_common > num_cached and rows.rank[row] <= rows.rank_of(request):
                return leader, num_common
        return None

    def remove(self, request_id: str) -> Request | None:
        """Take out one request; None if it does not stand aside."""
        self._leaders.pop(request_id, None)
        return self._requests.pop(request_id, None)

    def come_back(self) -> None:
        """Those that need not wait any longer queue again, in front of who came later."""
        for request in [request for request in self if not self._waits(request)]:
            self.remove(request.request_id)
            self._waiting.prepend(request)

    def clear(self) -> None:
        """All queue again."""
        for request in list(self):
            self.remove(request.request_id)
            self._waiting.prepend(request)

    def _waits(self, request: Request) -> bool:
        if request.request_id not in self._leaders:
            return self._kv_cache.is_fetching(request)
        leader, num_common = self._leaders[request.request_id]
        if leader.row is None or not self._rows.num_to_prefill(leader.row) > 0:
            return False
        return self._kv_cache.num_cached_tokens(request) < num_common
