"""Nobody computes what another is about to have computed."""

from jaxllm.core.integrity import check_integrity
from jaxllm.core.scheduler import Scheduler
from jaxllm.messages import EngineCoreRequest
from tests.core.test_scheduler import run_step, scheduler_with
from tests.fakes.plans import make_request

PROMPT = tuple(range(30))


def siblings(n: int) -> tuple[EngineCoreRequest, ...]:
    return tuple(make_request(f"r{i}", PROMPT, 3) for i in range(n))


def fed(scheduler: Scheduler) -> int:
    total = 0
    while scheduler.has_work():
        step, _ = run_step(scheduler)
        total += step.num_tokens
    return total


def test_a_long_prompt_is_computed_once_for_all_siblings():
    """30 tokens in blocks of 4: all but the last part of a block is shared."""
    alone = fed(scheduler_with(*siblings(1), max_num_batched_tokens=8))
    together = fed(scheduler_with(*siblings(4), max_num_batched_tokens=8))
    assert alone == 30 + 2
    assert together <= alone + 3 * (2 + 2)


def test_who_comes_while_the_prompt_is_computed_waits_and_lets_others_pass():
    scheduler = scheduler_with(siblings(2)[0], max_num_batched_tokens=8)
    run_step(scheduler)
    scheduler.add_request(siblings(2)[1])
    scheduler.add_request(make_request("other", 3, 2))
    step, _ = run_step(scheduler)
    assert step.request_ids == ("r0", "other")
    assert [r.request_id for r in scheduler.aside] == ["r1"]
    assert scheduler.stats().num_waiting == 1


def test_who_stands_aside_does_not_outwait_its_leader():
    scheduler = scheduler_with(*siblings(2), max_num_batched_tokens=8)
    run_step(scheduler)
    scheduler.abort(["r0"])
    step, _ = run_step(scheduler)
    assert step.request_ids == ("r1",) and step.starts.tolist() == [8]
    assert not len(scheduler.aside)


def test_who_stands_aside_may_leave():
    scheduler = scheduler_with(*siblings(2), max_num_batched_tokens=8)
    run_step(scheduler)
    (ended,) = scheduler.abort(["r1"])
    assert ended.finish_reason == "abort" and not len(scheduler.aside)
    check_integrity(scheduler)


def test_short_ones_compute_for_themselves():
    scheduler = scheduler_with(
        *(make_request(f"r{i}", PROMPT[:12], 3) for i in range(2)),
        make_request("long", PROMPT, 3),
        max_num_batched_tokens=64,
    )
    step, _ = run_step(scheduler)
    assert step.request_ids == ("r0", "r1", "long") and not len(scheduler.aside)
