"""What a scheduling policy decides: who of those that wait is next, and who makes way for whom."""

from collections.abc import Iterable, Iterator
from typing import ClassVar, Protocol

from jaxllm.core.request import Request


class SchedulingPolicy(Protocol):
    """The waiting requests, in the policy's order. No operation walks over all of them."""

    preempts: ClassVar[bool]  # whether a waiting request may take the place of a running one

    def rank(self, request: Request) -> int:
        """Of running requests the lower rank goes first and the highest is preempted first; among
        equals the older goes first, and the newest is preempted first. Never changes.
        """
        ...

    def add(self, request: Request) -> None:
        """A request that has just arrived."""
        ...

    def prepend(self, request: Request) -> None:
        """A preempted request: it had been chosen before its equals that wait now."""
        ...

    def peek(self) -> Request:
        """The request to run next. There must be one."""
        ...

    def remove(self, request_id: str) -> Request | None:
        """Take out one request wherever it is; None if it does not wait here."""
        ...

    def admitted(self, request: Request, num_tokens: int) -> None:
        """It was given a row, and will compute so many tokens before it samples one."""
        ...

    def decoded(self, requests: Iterable[Request]) -> None:
        """Each of them computes one more token in this step."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]:
        """All that wait, the next one first; how the others follow may be a guess."""
        ...
