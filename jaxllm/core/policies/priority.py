"""Lower ``priority`` first, then first come, first served. A better request takes the place of a
worse one.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import ClassVar

from jaxllm.core.policies.lanes import Lanes
from jaxllm.core.request import Request


class PriorityPolicy:
    """One lane per priority, and the priorities in order: finding a place is O(log n), making one
    moves machine words only.
    """

    preempts: ClassVar[bool] = True

    def __init__(self) -> None:
        self._lanes: Lanes[int] = Lanes()
        self._priorities: list[int] = []  # of the lanes, sorted

    def rank(self, request: Request) -> int:
        return request.core_request.priority

    def add(self, request: Request) -> None:
        self._put(request, first=False)

    def prepend(self, request: Request) -> None:
        self._put(request, first=True)

    def _put(self, request: Request, *, first: bool) -> None:
        if self._lanes.put(self.rank(request), request, first=first):
            insort(self._priorities, self.rank(request))

    def peek(self) -> Request:
        return self._lanes[self._priorities[0]].peek()

    def remove(self, request_id: str) -> Request | None:
        found = self._lanes.remove(request_id)
        if found is None:
            return None
        request, priority = found
        if priority not in self._lanes:
            del self._priorities[bisect_left(self._priorities, priority)]
        return request

    def admitted(self, request: Request, num_tokens: int) -> None:
        pass

    def decoded(self, requests: Iterable[Request]) -> None:
        pass

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Request]:
        return chain.from_iterable(self._lanes[priority] for priority in self._priorities)
