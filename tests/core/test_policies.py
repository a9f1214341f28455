"""Each policy's queue, against what is obvious."""

from collections.abc import Callable
from random import Random
from time import perf_counter

import pytest

from jaxllm.config.scheduling import POLICY_NAMES, SchedulingConfig
from jaxllm.core.invariant import InvariantError
from jaxllm.core.policies import POLICIES
from jaxllm.core.policies.fair import FairPolicy
from jaxllm.core.policies.policy import SchedulingPolicy
from jaxllm.core.request import Request
from tests.fakes.plans import make_request

every_policy = pytest.mark.parametrize("name", POLICY_NAMES)


def make(name: str) -> SchedulingPolicy:
    return POLICIES[name](SchedulingConfig(policy=name))


def requests(*names: str, **fields) -> list[Request]:
    return [Request(make_request(name, **fields), i, 64) for i, name in enumerate(names)]


def test_every_name_is_a_policy():
    assert tuple(POLICIES) == POLICY_NAMES


@every_policy
def test_equals_are_first_come_first_served(name: str):
    queue = make(name)
    a, b = requests("a", "b")
    queue.add(a)
    queue.add(b)
    assert queue.peek() is a and len(queue) == 2
    assert queue.remove("a") is a and queue.peek() is b
    assert queue.remove("b") is b and len(queue) == 0 and list(queue) == []


@every_policy
def test_preempted_requests_go_before_their_equals(name: str):
    queue = make(name)
    a, b, c = requests("a", "b", "c")
    queue.add(c)
    queue.prepend(b)
    queue.prepend(a)
    assert list(queue) == [a, b, c]


@every_policy
def test_removal_from_anywhere(name: str):
    queue = make(name)
    a, b, c = requests("a", "b", "c")
    for request in (a, b, c):
        queue.add(request)
    assert queue.remove("b") is b
    assert queue.remove("b") is None
    assert list(queue) == [a, c]


@every_policy
def test_a_request_waits_once(name: str):
    queue = make(name)
    (a,) = requests("a")
    queue.add(a)
    with pytest.raises(InvariantError):
        queue.add(a)


def lowest_priority_first(queue: SchedulingPolicy, waiting: list[Request]) -> Request:
    return min(waiting, key=lambda r: (r.core_request.priority, r.arrival_index))


def oldest_of_its_tenant(queue: SchedulingPolicy, waiting: list[Request]) -> Request:
    tenant = queue.peek().core_request.tenant
    return next(request for request in waiting if request.core_request.tenant == tenant)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fcfs", lambda queue, waiting: waiting[0]),
        ("priority", lowest_priority_first),
        ("fair", oldest_of_its_tenant),
    ],
)
def test_order_in_random_runs(
    name: str, expected: Callable[[SchedulingPolicy, list[Request]], Request]
):
    for seed in range(20):
        random, queue = Random(seed), make(name)
        waiting: list[Request] = []  # in order of arrival
        for i in range(200):
            if random.random() < 0.6 or not waiting:
                fields = {"priority": random.randint(-3, 3), "tenant": random.choice("abc")}
                request = Request(make_request(f"r{i}", 2, **fields), i, 64)
                queue.add(request)
                waiting.append(request)
            elif random.random() < 0.2:
                gone = random.choice(waiting)
                assert queue.remove(gone.request_id) is gone
                waiting.remove(gone)
            else:
                chosen = queue.peek()
                assert chosen is expected(queue, waiting), seed
                assert next(iter(queue)) is chosen
                queue.remove(chosen.request_id)
                waiting.remove(chosen)
                queue.admitted(chosen, random.randint(1, 50))
            assert len(queue) == len(waiting)
            assert sorted(r.arrival_index for r in queue) == [r.arrival_index for r in waiting]


@every_policy
def test_ten_thousand_waiting_cost_hardly_more_than_a_hundred(name: str):
    def seconds(num_waiting: int) -> float:
        queue = make(name)
        made = [
            Request(make_request(f"r{i}", 1, priority=i % 1000, tenant=str(i % 1000)), i, 64)
            for i in range(num_waiting)
        ]
        for request in made:
            queue.add(request)

        def turn() -> float:
            started = perf_counter()
            for _ in range(50):
                request = queue.peek()
                queue.remove(request.request_id)
                queue.admitted(request, 7)
                queue.prepend(request)
                queue.remove(made[-1].request_id)
                queue.add(made[-1])
            return perf_counter() - started

        return min(turn() for _ in range(5))

    assert seconds(10_000) < 10 * seconds(100)  # a walk over all would be a hundred times as long


def test_who_was_idle_has_saved_nothing():
    queue = FairPolicy()
    busy = requests(*(f"b{i}" for i in range(10)), tenant="busy")
    for request in busy:
        queue.add(request)
    for request in busy[:5]:
        assert queue.peek() is request
        queue.remove(request.request_id)
        queue.admitted(request, 100)
    late = requests("l0", "l1", "l2", tenant="late")
    for request in late:
        queue.add(request)
    order = []
    for _ in range(4):
        request = queue.peek()
        order.append(request.core_request.tenant)
        queue.remove(request.request_id)
        queue.admitted(request, 100)
    assert order.count("late") == 2  # not all three at once, for the five that it missed


def test_who_comes_to_an_empty_queue_does_not_start_at_zero():
    queue = FairPolicy()
    a = requests("a0", "a1", "a2", tenant="a")
    for request in a[:2]:
        queue.add(request)
        queue.remove(request.request_id)
        queue.admitted(request, 100)
    new = requests("n0", "n1", tenant="n")
    for request in new:
        queue.add(request)
    queue.add(a[2])
    assert queue.peek() is new[0]  # at 100, where a was when it was last chosen
    queue.remove("n0")
    queue.admitted(new[0], 101)
    assert queue.peek() is a[2]  # from zero, the new one would go on alone
