"""Who stands aside: requests whose turn has come while what they need is just being computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jaxllm.core.kv_cache_manager import KVCacheManager
from jaxllm.core.request import Request
from jaxllm.core.row_table import RowTable


class StandingAside:
    """Requests that have left the queue and have no row yet; they come back in front of it.

    Whoever shares the beginning of its prompt with a prefill under way waits until that prefill
    has got so far, instead of computing the same beside it. It never waits for one of worse rank,
    nor for one that has left its row.
    """

    def __init__(self, kv_cache: KVCacheManager, rows: RowTable, threshold: int):
        """Who has no more than ``threshold`` tokens to compute computes them."""
        self._threshold = threshold
        self._kv_cache = kv_cache
        self._rows = rows
        self._requests: dict[str, Request] = {}
        self._leaders: dict[str, tuple[Request, int]] = {}  # and how far it must have got, tokens

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def pick(self, waiting: Iterable[Request]) -> list[Request]:
        """Take those that are to stand aside among the first for whom there are rows."""
        num_rows, taken = self._rows.num_free, list[Request]()
        for request in waiting if num_rows else ():
            if self.takes(request):
                taken.append(request)
                continue
            num_rows -= 1
            if not num_rows:
                break
        return taken

    def takes(self, request: Request) -> bool:
        """Whether a waiting request stands aside from now on; who asks takes it from the queue."""
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

    def come_back(self) -> list[Request]:
        """Take out those that need not wait any longer, in the order in which they came."""
        ready = [request for request in self if not self._waits(request)]
        for request in ready:
            self.remove(request.request_id)
        return ready

    def clear(self) -> list[Request]:
        """Take out all."""
        everybody = list(self)
        self._requests.clear()
        self._leaders.clear()
        return everybody

    def _waits(self, request: Request) -> bool:
        leader, num_common = self._leaders[request.request_id]
        if leader.row is None or not self._rows.num_to_prefill(leader.row) > 0:
            return False
        return self._kv_cache.num_cached_tokens(request) < num_common
