"""Requests that wait for a row. A scheduling policy is one class here and one line in POLICIES."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import Request


class RequestQueue(Protocol):
    def add(self, request: Request) -> None:
        """A request that has just arrived."""
        ...

    def prepend(self, request: Request) -> None:
        """A preempted request: it had been chosen before all that wait now."""
        ...

    def peek(self) -> Request:
        """The request to run next. The queue must not be empty."""
        ...

    def pop(self) -> Request: ...

    def remove(self, request_id: str) -> Request | None:
        """Take out one request wherever it is; None if it does not wait here."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


class FCFSQueue:
    """First come, first served. Every operation is O(1)."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def add(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise InvariantError(f"Request {request.request_id!r} already waits.")
        self._requests[request.request_id] = request

    def prepend(self, request: Request) -> None:
        self.add(request)
        self._requests.move_to_end(request.request_id, last=False)

    def peek(self) -> Request:
        return next(iter(self._requests.values()))

    def pop(self) -> Request:
        return self._requests.popitem(last=False)[1]

    def remove(self, request_id: str) -> Request | None:
        return self._requests.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())


POLICIES: dict[str, type[RequestQueue]] = {"fcfs": FCFSQueue}
