"""First come, first served."""

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from heapq import merge
from typing import ClassVar

from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import Request


def _arrival(request: Request) -> int:
    return request.arrival_index


class FCFSPolicy:
    """Every operation is O(1), and one on a preempted request O(number of those that wait)."""

    preempts: ClassVar[bool] = False

    def __init__(self) -> None:
        self._new: OrderedDict[str, Request] = OrderedDict()
        # By arrival. Not all came before the new ones: after a failure one may run out of turn.
        self._preempted: list[Request] = []

    def rank(self, request: Request) -> int:
        return 0

    def add(self, request: Request) -> None:
        if request.request_id in self._new:
            raise InvariantError(f"Request {request.request_id!r} already waits.")
        self._new[request.request_id] = request

    def prepend(self, request: Request) -> None:
        insort(self._preempted, request, key=_arrival)

    def peek(self) -> Request:
        return next(iter(self))

    def remove(self, request_id: str) -> Request | None:
        for index, request in enumerate(self._preempted):
            if request.request_id == request_id:
                return self._preempted.pop(index)
        return self._new.pop(request_id, None)

    def admitted(self, request: Request, num_tokens: int) -> None:
        pass

    def decoded(self, requests: Iterable[Request]) -> None:
        pass

    def __len__(self) -> int:
        return len(self._new) + len(self._preempted)

    def __iter__(self) -> Iterator[Request]:
        if not self._preempted:
            return iter(self._new.values())
        return merge(self._preempted, self._new.values(), key=_arrival)
