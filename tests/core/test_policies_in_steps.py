"""What policies promise, in runs of the scheduler: who is preempted, who waits, who shares."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from jaxllm.config.scheduling import SchedulingConfig
from jaxllm.core.integrity import check_integrity
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.executor import ModelRunnerOutput
from tests.fakes.plans import make_plan, make_request


def scheduler_of(policy: str, *weights: str, **plan) -> Scheduler:
    return Scheduler(make_plan(**plan), SchedulingConfig(policy, weights))


def step_of(scheduler: Scheduler) -> SchedulerOutput:
    step = scheduler.schedule()
    assert step is not None
    check_integrity(scheduler, step)
    n = step.rows.size
    output = ModelRunnerOutput(step.step_id, np.full(n, 9, np.int32), np.full(n, True))
    scheduler.update(step, output)
    return step


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_a_running_request_stays_whatever_waits(policy: str):
    scheduler = scheduler_of(policy, max_num_seqs=1)
    scheduler.add_request(make_request("a", priority=5, tenant="x"))
    step_of(scheduler)
    scheduler.add_request(make_request("b", priority=-5, tenant="y"))
    assert step_of(scheduler).request_ids == ("a",)


def test_a_better_request_takes_the_row_of_the_worst_and_newest():
    scheduler = scheduler_of("priority", max_num_seqs=3)
    for name, priority in (("best", 0), ("worse", 2), ("worse, newer", 2)):
        scheduler.add_request(make_request(name, priority=priority))
    step_of(scheduler)
    scheduler.add_request(make_request("good", priority=1))
    step = step_of(scheduler)
    assert set(step.request_ids) == {"best", "worse", "good"}
    assert [new.request.request_id for new in step.new_rows] == ["good"]
    assert scheduler.requests["worse, newer"].num_preemptions == 1


def test_equals_do_not_preempt_each_other():
    scheduler = scheduler_of("priority", max_num_seqs=1)
    scheduler.add_request(make_request("a", priority=1))
    step_of(scheduler)
    scheduler.add_request(make_request("b", priority=1))
    assert step_of(scheduler).request_ids == ("a",)
    assert scheduler.num_preemptions == 0


def test_a_better_request_takes_as_many_blocks_as_it_needs():
    scheduler = scheduler_of("priority", num_blocks=7, max_num_batched_tokens=64)
    for name in ("a", "b", "c"):
        scheduler.add_request(make_request(name, 7, 4, priority=1))  # two blocks of four each
    step_of(scheduler)
    scheduler.add_request(make_request("urgent", 15, 2))
    step = step_of(scheduler)
    assert set(step.request_ids) == {"a", "urgent"}
    assert [r.request_id for r in scheduler.waiting] == ["b", "c"]


def test_nobody_is_preempted_for_what_would_not_fit_anyway():
    scheduler = scheduler_of("priority", num_blocks=7, max_num_batched_tokens=64)
    scheduler.add_request(make_request("good", 11, 8))  # three blocks of six
    scheduler.add_request(make_request("bad", 4, 8, priority=5))
    step_of(scheduler)
    scheduler.add_request(make_request("large", 20, 2, priority=1))  # wants five
    assert set(step_of(scheduler).request_ids) == {"good", "bad"}


def test_without_blocks_the_worst_goes_though_it_is_the_oldest():
    scheduler = scheduler_of("priority", num_blocks=6, max_model_len=16)
    scheduler.add_request(make_request("bad", 8, 5, priority=1))
    scheduler.add_request(make_request("good", 8, 5))
    step_of(scheduler)
    assert step_of(scheduler).request_ids == ("good",)
    assert scheduler.requests["bad"].num_preemptions == 1


def test_several_better_requests_take_their_places_in_one_step():
    scheduler = scheduler_of("priority", max_num_seqs=3, max_num_batched_tokens=64)
    for i in range(3):
        scheduler.add_request(make_request(f"low{i}", priority=1))
    step_of(scheduler)
    for i in range(2):
        scheduler.add_request(make_request(f"high{i}"))
    assert set(step_of(scheduler).request_ids) == {"low0", "high0", "high1"}


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_starts_follow_the_order(policy: str):
    """Whoever starts goes before all that still wait: no request starves but for better ones."""
    for seed in range(20):
        random = Random(seed)
        scheduler = scheduler_of(policy, num_blocks=random.choice((17, 30)))
        for i in range(60):
            if random.random() < 0.5:
                prompt, answer = random.randint(1, 20), random.randint(1, 10)
                request = make_request(f"r{i}", prompt, answer, priority=random.randint(0, 2))
                scheduler.add_request(request)
            if not scheduler.has_work():
                continue
            step = step_of(scheduler)
            for new in step.new_rows:
                for other in scheduler.waiting:
                    if other.num_preemptions == 0 and policy == "fcfs":
                        assert new.request.request_id != other.request_id
                        assert int(new.request.request_id[1:]) < int(other.request_id[1:]), seed
                    if policy == "priority":
                        assert new.request.priority <= other.core_request.priority, seed


def served(scheduler: Scheduler, num_steps: int, sizes: dict[str, tuple[int, int]], seed: int):
    """Tokens computed so far by tenant, after each step; all tenants always have more to do."""
    random, counts, tokens = Random(seed), Counter[str](), Counter[str]()
    for _ in range(num_steps):
        for tenant, (prompt, answer) in sizes.items():
            while sum(r.core_request.tenant == tenant for r in scheduler.waiting) < 8:
                counts[tenant] += 1
                request = make_request(
                    f"{tenant}{counts[tenant]}",
                    random.randint(1, prompt),
                    random.randint(1, answer),
                    tenant=tenant,
                )
                scheduler.add_request(request)
        step = step_of(scheduler)
        for name, num_tokens in zip(step.request_ids, step.num_new_tokens.tolist(), strict=True):
            tokens[name[0]] += num_tokens
        yield tokens


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_rows", [1, 8])
def test_backlogged_tenants_share_by_weight(seed: int, num_rows: int):
    """Shares are never further apart than one request for each row."""
    random = Random(seed)
    weights = {"a": random.choice((1.0, 2.0)), "b": 1.0, "c": random.choice((0.5, 4.0))}
    sizes = {name: (random.randint(1, 30), random.randint(1, 20)) for name in weights}
    scheduler = scheduler_of("fair", *(f"{k}={v}" for k, v in weights.items()),
                             max_num_seqs=num_rows, num_blocks=200)  # fmt: skip
    apart = num_rows * max(sum(size) / weights[name] for name, size in sizes.items())
    for tokens in served(scheduler, 800, sizes, seed):
        shares = [tokens[name] / weight for name, weight in weights.items()]
        assert max(shares) - min(shares) <= apart
    assert min(shares) > 4 * apart, "too short to show anything"


def test_without_fair_shares_the_greedy_one_gets_more():
    """The run above can fail: first come, first served splits by what is sent."""
    sizes = {"a": (30, 20), "b": (2, 2)}
    *_, tokens = served(scheduler_of("fcfs", max_num_seqs=1, num_blocks=200), 600, sizes, 1)
    assert tokens["a"] > 4 * tokens["b"]
