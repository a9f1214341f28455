import numpy as np
import pytest

from jaxllm.config.plan import BatchKind
from jaxllm.core.integrity import check_integrity
from jaxllm.core.invariant import InvariantError
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.errors import InvalidRequestError
from jaxllm.messages import StepOutputs
from tests.fakes.plans import EOS, make_plan, make_request


def scheduler_with(*requests, **plan) -> Scheduler:
    scheduler = Scheduler(make_plan(**plan))
    for request in requests:
        scheduler.add_request(request)
    return scheduler


def schedule(scheduler: Scheduler) -> SchedulerOutput:
    step = scheduler.schedule()
    assert step is not None
    check_integrity(scheduler, step)
    return step


def answer(step: SchedulerOutput, token: int = 9, finite: bool = True) -> ModelRunnerOutput:
    n = step.rows.size
    return ModelRunnerOutput(step.step_id, np.full(n, token, np.int32), np.full(n, finite))


def run_step(scheduler: Scheduler, token: int = 9) -> tuple[SchedulerOutput, StepOutputs]:
    step = schedule(scheduler)
    outputs = scheduler.update(step, answer(step, token))
    check_integrity(scheduler)
    return step, outputs


def test_prefill_then_decode():
    scheduler = scheduler_with(make_request("a", 5, 3))
    first, outputs = run_step(scheduler)
    assert first.bucket.kind is BatchKind.MIXED and first.num_decode_rows == 0
    assert (first.starts.tolist(), first.num_new_tokens.tolist()) == ([0], [5])
    assert first.samples.tolist() == [True] and len(first.new_rows) == 1
    assert first.new_blocks == ((0, 0, 1), (0, 1, 2))
    assert (outputs.request_ids, outputs.token_ids, outputs.events) == (["a"], [9], [])
    second, _ = run_step(scheduler)
    assert second.bucket.kind is BatchKind.DECODE and second.num_decode_rows == 1
    assert (second.starts.tolist(), second.new_rows, second.new_blocks) == ([5], (), ())
    _, outputs = run_step(scheduler, token=4)
    (event,) = outputs.events
    assert (event.new_token_ids, event.finish_reason, event.stop_reason) == ((4,), "length", None)
    assert outputs.request_ids == [] and not scheduler.has_work()
    assert scheduler.schedule() is None


def test_long_prompts_come_in_chunks_beside_decodes():
    scheduler = scheduler_with(make_request("a", 4), max_num_batched_tokens=8)
    run_step(scheduler)
    scheduler.add_request(make_request("b", 16))
    steps = [run_step(scheduler)[0] for _ in range(3)]
    assert [step.num_new_tokens.tolist() for step in steps] == [[1, 7], [1, 7], [1, 2]]
    assert [step.samples.tolist() for step in steps] == [[True, False], [True, False], [True, True]]
    assert all(step.num_decode_rows == 1 and step.num_tokens <= 8 for step in steps)
    assert run_step(scheduler)[0].num_decode_rows == 2


def test_admission_stops_at_rows():
    scheduler = scheduler_with(*(make_request(f"r{i}", 2) for i in range(6)), max_num_seqs=4)
    assert schedule(scheduler).request_ids == ("r0", "r1", "r2", "r3")
    assert (scheduler.stats().num_running, scheduler.stats().num_waiting) == (4, 2)


def test_admission_stops_at_blocks_and_keeps_the_order():
    scheduler = scheduler_with(
        make_request("a", 8, 1), make_request("b", 8, 1), make_request("c", 2, 1), num_blocks=4
    )
    assert schedule(scheduler).request_ids == ("a",)  # c would fit, but b came first


def test_one_token_prompts_use_a_decode_bucket_but_are_no_decode_rows():
    scheduler = scheduler_with(make_request("a", 1))
    step = schedule(scheduler)
    assert step.bucket.kind is BatchKind.DECODE and step.num_decode_rows == 0


def test_one_step_ahead_feeds_the_token_in_flight():
    scheduler = scheduler_with(make_request("a", 4, 3))
    first, second = schedule(scheduler), schedule(scheduler)
    assert (second.starts.tolist(), second.num_decode_rows) == ([4], 1)
    assert scheduler.rows.num_in_flight(0) == 2
    assert scheduler.update(first, answer(first)).token_ids == [9]
    third = schedule(scheduler)
    assert scheduler.schedule() is None  # the third token is the last one: nothing more to feed
    scheduler.update(second, answer(second))
    assert scheduler.update(third, answer(third)).events[0].finish_reason == "length"


def test_a_surplus_token_after_eos_is_dropped_and_its_row_reused_at_once():
    scheduler = scheduler_with(
        make_request("a", 4, 9, eos=(EOS,)), make_request("b", 4, 9), max_num_seqs=1
    )
    first, second = schedule(scheduler), schedule(scheduler)
    assert scheduler.update(first, answer(first, EOS)).events[0].finish_reason == "stop"
    third = schedule(scheduler)
    assert third.finished_rows == (0,) and third.new_rows[0].request.request_id == "b"
    late = scheduler.update(second, answer(second))
    assert (late.request_ids, late.events) == ([], [])
    assert scheduler.update(third, answer(third)).request_ids == ["b"]


def tight_pair() -> Scheduler:
    """Two requests in five blocks that will want six."""
    return scheduler_with(
        make_request("old", 8, 5), make_request("new", 8, 5), num_blocks=6, max_model_len=16
    )


def test_the_newest_is_preempted_and_resumes_with_its_output():
    scheduler = tight_pair()
    _, outputs = run_step(scheduler, token=7)
    assert outputs.request_ids == ["old", "new"]
    step, _ = run_step(scheduler)
    assert step.request_ids == ("old",) and step.finished_rows == (1,)
    assert scheduler.stats().num_preemptions == 1
    while "old" in scheduler.requests:
        assert run_step(scheduler)[0].request_ids == ("old",)
    step, _ = run_step(scheduler)
    (resumed,) = step.new_rows
    assert resumed.token_ids == (*resumed.request.prompt_token_ids, 7)
    assert resumed.num_computed == 8 and step.num_new_tokens.tolist() == [1]  # where it was


def test_a_token_in_flight_at_preemption_is_dropped():
    scheduler = tight_pair()
    first, second = schedule(scheduler), schedule(scheduler)
    assert second.request_ids == ("old",)
    assert scheduler.update(first, answer(first)).request_ids == ["old"]
    assert scheduler.requests["new"].output_token_ids == []


def test_a_request_at_its_end_is_no_victim():
    scheduler = scheduler_with(
        make_request("old", 8, 5), make_request("new", 8, 1), num_blocks=5, max_model_len=16
    )
    first = schedule(scheduler)
    # "old" wants a fifth block, "new" has its last token in flight: only "old" can make way.
    assert scheduler.schedule() is None
    assert scheduler.requests["old"].num_preemptions == 1
    assert scheduler.update(first, answer(first)).events[0].request_id == "new"
    assert schedule(scheduler).request_ids == ("old",)


def test_abort_in_every_state():
    scheduler = scheduler_with(make_request("a"), make_request("b"), max_num_seqs=1)
    step = schedule(scheduler)
    ended = scheduler.abort(["b", "a", "a", "nobody"])
    assert [(e.request_id, e.finish_reason) for e in ended] == [("b", "abort"), ("a", "abort")]
    check_integrity(scheduler)
    assert scheduler.pool.usage == 0.0 and not scheduler.has_work()
    late = scheduler.update(step, answer(step))
    assert (late.request_ids, late.events) == ([], [])


def test_same_id_again_after_an_abort_gets_nothing_of_the_first():
    scheduler = scheduler_with(make_request("a"))
    step = schedule(scheduler)
    scheduler.abort(["a"])
    scheduler.add_request(make_request("a"))
    again = schedule(scheduler)
    assert scheduler.update(step, answer(step)).request_ids == []
    assert scheduler.update(again, answer(again)).request_ids == ["a"]


def test_rows_that_are_not_finite_fail_alone():
    scheduler = scheduler_with(make_request("a"), make_request("b"))
    step = schedule(scheduler)
    output = answer(step)
    output.finite[1] = False
    outputs = scheduler.update(step, output)
    assert outputs.request_ids == ["a"]
    (event,) = outputs.events
    assert (event.request_id, event.finish_reason) == ("b", "error") and event.error
    check_integrity(scheduler)


def test_max_tokens_zero_computes_the_prompt_only():
    scheduler = scheduler_with(make_request("a", 12, 0), max_num_batched_tokens=8)
    step, outputs = run_step(scheduler)
    assert not step.samples.any() and outputs.events == []
    step, outputs = run_step(scheduler)
    assert not step.samples.any()
    assert (outputs.events[0].finish_reason, outputs.events[0].new_token_ids) == ("length", ())


def test_missing_logprobs_are_an_executor_bug():
    scheduler = scheduler_with(make_request("a", logprobs=1))
    step = schedule(scheduler)
    with pytest.raises(InvariantError, match="logprobs"):
        scheduler.update(step, answer(step))


def test_isolated_request_runs_alone():
    scheduler = scheduler_with(make_request("a"), make_request("b"))
    scheduler.isolate("b")
    assert schedule(scheduler).request_ids == ("b",)
    scheduler.isolate(None)
    assert set(schedule(scheduler).request_ids) == {"a", "b"}


def test_reset_forgets_the_device():
    scheduler = scheduler_with(make_request("a"), make_request("b"))
    step = schedule(scheduler)
    scheduler.reset()
    check_integrity(scheduler)
    with pytest.raises(InvariantError):
        scheduler.update(step, answer(step))
    again = schedule(scheduler)
    assert again.finished_rows == () and again.request_ids == ("a", "b")


def test_results_must_come_in_order():
    scheduler = scheduler_with(make_request("a"))
    schedule(scheduler)
    second = schedule(scheduler)
    with pytest.raises(InvariantError):
        scheduler.update(second, answer(second))


def test_a_request_the_pool_can_never_hold_is_refused():
    scheduler = scheduler_with(num_blocks=4)  # 3 usable blocks of 4 tokens
    scheduler.add_request(make_request("fits", 8, 5))  # the last token is never fed
    with pytest.raises(InvalidRequestError) as error:
        scheduler.add_request(make_request("large", 8, 6))
    assert error.value.param == "max_tokens"
    assert list(scheduler.requests) == ["fits"]


def test_an_id_in_use_is_refused():
    scheduler = scheduler_with(make_request("a"))
    with pytest.raises(InvalidRequestError):
        scheduler.add_request(make_request("a"))


def test_the_same_calls_give_the_same_steps():
    def steps() -> list[str]:
        scheduler = scheduler_with(
            *(make_request(f"r{i}", 3 + i, 9) for i in range(6)), num_blocks=10
        )
        seen = []
        while scheduler.has_work():
            seen.append(str(run_step(scheduler)[0]))
        return seen

    assert steps() == steps()
