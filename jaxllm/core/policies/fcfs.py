"""First come, first served."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import ClassVar

from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import Request


class FCFSPolicy:
    """Every operation is O(1)."""

    preempts: ClassVar[bool] = False

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def rank(self, request: Request) -> int:
        return 0

    def add(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise InvariantError(f"Request {request.request_id!r} already waits.")
        self._requests[request.request_id] = request

    def prepend(self, request: Request) -> None:
        self.add(request)
        self._requests.move_to_end(request.request_id, last=False)

    def peek(self) -> Request:
        return next(iter(self._requests.values()))

    def remove(self, request_id: str) -> Request | None:
        return self._requests.pop(request_id, None)

    def admitted(self, request: Request, num_tokens: int) -> None:
        pass

    def decoded(self, requests: Iterable[Request]) -> None:
        pass

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())
