"""Waiting requests in several lanes, each first come, first served; which lane is next is open."""

from collections.abc import Hashable

from jaxllm.core.invariant import InvariantError
from jaxllm.core.policies.fcfs import FCFSPolicy
from jaxllm.core.request import Request


class Lanes[Key: Hashable]:
    """Lanes exist while somebody waits in them. Every operation is O(1)."""

    def __init__(self) -> None:
        self._lanes: dict[Key, FCFSPolicy] = {}
        self._lane_of: dict[str, Key] = {}

    def __len__(self) -> int:
        return len(self._lane_of)

    def __contains__(self, key: Key) -> bool:
        return key in self._lanes

    def __getitem__(self, key: Key) -> FCFSPolicy:
        return self._lanes[key]

    def put(self, key: Key, request: Request, *, first: bool) -> bool:
        """Queue a request in front of a lane or behind it. True if that lane is new."""
        if request.request_id in self._lane_of:
            raise InvariantError(f"Request {request.request_id!r} already waits.")
        new = key not in self._lanes
        lane = self._lanes.setdefault(key, FCFSPolicy())
        if first:
            lane.prepend(request)
        else:
            lane.add(request)
        self._lane_of[request.request_id] = key
        return new

    def remove(self, request_id: str) -> tuple[Request, Key] | None:
        """A request and the key of its lane, which may end with it; None if it does not wait."""
        if request_id not in self._lane_of:
            return None
        key = self._lane_of.pop(request_id)
        lane = self._lanes[key]
        request = lane.remove(request_id)
        if request is None:
            raise InvariantError(f"Request {request_id!r} is not in its lane.")
        if not len(lane):
            del self._lanes[key]
        return request, key
