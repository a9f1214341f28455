"""Weighted fair shares between tenants: next is who was served least for its weight.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), whose virtual token
counter is start-time fair queueing where the size of a job is not known before its end.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from heapq import heappop, heappush, heapreplace
from itertools import chain
from typing import ClassVar

from jaxllm.core.policies.lanes import Lanes
from jaxllm.core.request import Request


class FairPolicy:
    """A counter per tenant grows by tokens / weight: those of a prefill when it gets its row, then
    one for each step of decoding. The tenant with the lowest counter is next, within it whoever
    came first. O(log tenants).

    Who had nothing waiting may not save up its share: its counter is lifted to the lowest of those
    who wait. A prefill is charged as often as it is computed, since others wait for it each time.

    Args:
        weights: by tenant; 1 for who is not named. All above 0.
    """

    preempts: ClassVar[bool] = False

    def __init__(self, weights: Mapping[str, float] | None = None):
        self._weights = dict(weights or {})
        self._lanes: Lanes[str] = Lanes()
        self._counters: dict[str, float] = {}
        # Counters as they were; each tenant once. Who is at the top is brought up to date.
        self._heap: list[tuple[float, str]] = []
        self._in_heap: set[str] = set()
        self._last = 0.0  # counter of who was next when it was

    def rank(self, request: Request) -> int:
        return 0

    def add(self, request: Request) -> None:
        self._put(request, first=False)

    def prepend(self, request: Request) -> None:
        self._put(request, first=True)

    def _put(self, request: Request, *, first: bool) -> None:
        tenant = request.core_request.tenant
        lowest = self._counters[self._next_tenant()] if len(self._lanes) else self._last
        if not self._lanes.put(tenant, request, first=first):
            return
        self._counters[tenant] = max(self._counters.get(tenant, 0.0), lowest)
        if tenant not in self._in_heap:
            self._in_heap.add(tenant)
            heappush(self._heap, (self._counters[tenant], tenant))

    def peek(self) -> Request:
        return self._lanes[self._next_tenant()].peek()

    def _next_tenant(self) -> str:
        while True:
            counter, tenant = self._heap[0]
            if tenant not in self._lanes:
                heappop(self._heap)
                self._in_heap.remove(tenant)
            elif counter < self._counters[tenant]:
                heapreplace(self._heap, (self._counters[tenant], tenant))
            else:
                return tenant

    def remove(self, request_id: str) -> Request | None:
        found = self._lanes.remove(request_id)
        return None if found is None else found[0]

    def admitted(self, request: Request, num_tokens: int) -> None:
        tenant = request.core_request.tenant
        self._last = max(self._last, self._counters[tenant])
        self._charge(tenant, num_tokens)

    def decoded(self, requests: Iterable[Request]) -> None:
        for tenant, count in Counter(r.core_request.tenant for r in requests).items():
            self._charge(tenant, count)

    def _charge(self, tenant: str, num_tokens: int) -> None:
        self._counters[tenant] += num_tokens / self._weights.get(tenant, 1.0)

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Request]:
        tenants = [self._next_tenant()] if len(self._lanes) else []
        tenants += [tenant for _, tenant in self._heap if tenant not in tenants]
        return chain.from_iterable(self._lanes[t] for t in tenants if t in self._lanes)
