import pytest

from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import Request
from jaxllm.core.request_queue import POLICIES, FCFSQueue
from tests.fakes.plans import make_request


def requests(*names: str) -> list[Request]:
    return [Request(make_request(name), i, 64) for i, name in enumerate(names)]


def test_first_come_first_served():
    queue = FCFSQueue()
    a, b = requests("a", "b")
    queue.add(a)
    queue.add(b)
    assert queue.peek() is a and len(queue) == 2
    assert [queue.pop(), queue.pop()] == [a, b]
    assert len(queue) == 0


def test_preempted_requests_go_first():
    queue = FCFSQueue()
    a, b, c = requests("a", "b", "c")
    queue.add(c)
    queue.prepend(b)
    queue.prepend(a)
    assert list(queue) == [a, b, c]


def test_removal_from_anywhere():
    queue = FCFSQueue()
    a, b, c = requests("a", "b", "c")
    for request in (a, b, c):
        queue.add(request)
    assert queue.remove("b") is b
    assert queue.remove("b") is None
    assert list(queue) == [a, c]


def test_a_request_waits_once():
    queue = FCFSQueue()
    (a,) = requests("a")
    queue.add(a)
    with pytest.raises(InvariantError):
        queue.add(a)


def test_policies_are_found_by_name():
    assert POLICIES["fcfs"] is FCFSQueue
