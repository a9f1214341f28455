from collections.abc import Callable

import pytest

from jaxllm.core.integrity import check_integrity
from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import RequestStatus
from jaxllm.core.scheduler import Scheduler
from tests.fakes.plans import make_plan, make_request


def running_scheduler() -> Scheduler:
    scheduler = Scheduler(make_plan(max_num_seqs=2))
    for name in "abc":
        scheduler.add_request(make_request(name, 6))
    scheduler.schedule()
    return scheduler


def blocks(scheduler: Scheduler, request_id: str) -> list[int]:
    return scheduler.kv_cache._tables[request_id].blocks


def test_a_running_scheduler_adds_up():
    check_integrity(running_scheduler())


DAMAGES: dict[str, Callable[[Scheduler], object]] = {
    "block in two tables": lambda s: blocks(s, "a").append(blocks(s, "b")[0]),
    "block lost": lambda s: blocks(s, "a").pop(),
    "block free and owned": lambda s: s.pool._blank.append(blocks(s, "a")[0]),
    "null block owned": lambda s: blocks(s, "a").append(0),
    "owner forgotten": lambda s: s.pool.share(blocks(s, "a")[0]),
    "contents kept that nobody finds": lambda s: s.kv_cache.prefix.discard(blocks(s, "a")[0]),
    "contents found that are not kept": lambda s: s.pool.forget(blocks(s, "a")[0]),
    "row lost": lambda s: setattr(s.requests["a"], "row", None),
    "row shared": lambda s: setattr(s.requests["a"], "row", 1),
    "row of another": lambda s: s.rows.request.__setitem__(0, s.requests["b"]),
    "tenancy shared": lambda s: s.rows.tenancy.__setitem__(0, s.rows.tenancy[1]),
    "computed too far": lambda s: s.rows.num_computed.__setitem__(0, 99),
    "capacity wrong": lambda s: s.rows.capacity.__setitem__(0, 4),
    "waiting lost": lambda s: s.waiting.remove("c"),
    "request lost": lambda s: s.requests.pop("c"),
    "wrong status": lambda s: setattr(s.requests["a"], "status", RequestStatus.WAITING),
    "overdue": lambda s: s.requests["c"].output_token_ids.extend(range(8)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed(name: str):
    scheduler = running_scheduler()
    DAMAGES[name](scheduler)
    with pytest.raises(InvariantError):
        check_integrity(scheduler)


def test_a_step_over_the_budget_is_noticed():
    scheduler = Scheduler(make_plan())
    scheduler.add_request(make_request("a", 6))
    step = scheduler.schedule()
    assert step is not None
    check_integrity(scheduler, step)
    scheduler.token_budget = 5
    with pytest.raises(InvariantError, match="budget"):
        check_integrity(scheduler, step)
