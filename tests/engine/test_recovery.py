import logging

import pytest

from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.engine_core import EngineCore
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.engine.recovery import FAILED_ALONE
from jaxllm.simulation.answers import Answers
from jaxllm.simulation.checked import CheckedExecutor
from jaxllm.simulation.fake_executor import Fault
from jaxllm.simulation.faults import Faults
from jaxllm.simulation.oracle import run_alone
from tests.fakes.plans import VOCAB_SIZE, make_plan, make_request


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL, logger="jaxllm.engine.engine_core")


REQUESTS = [make_request(f"r{i}", 4 + i, 12, seed=i) for i in range(4)]


def run(fault: Fault, requests=REQUESTS, *, async_scheduling: bool = True, **plan):
    made = make_plan(**plan)
    executor = CheckedExecutor(made, fault)
    executor.watch(Scheduler(made))
    engine = EngineCore(executor.scheduler, executor, async_scheduling=async_scheduling)
    answers = Answers()
    for request in requests:
        engine.add_request(request)
        answers.expect(request.request_id)
    for _ in range(600):
        if not engine.has_work():
            break
        answers.take(engine.step())
    assert not engine.has_work() and not engine.recovery.active
    return executor, answers


def assert_right(answers: Answers, *failed: str) -> None:
    for request in REQUESTS:
        answer = answers.by_id[request.request_id]
        if request.request_id in failed:
            assert (answer.finish_reason, answer.error) == ("error", FAILED_ALONE)
        else:
            assert answer == run_alone(request, VOCAB_SIZE)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("where", ["dispatch", "fetch"])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_all_survive_a_passing_fault(number: int, where: str, async_scheduling: bool):
    executor, answers = run(
        lambda n, step: where if n == number else None, async_scheduling=async_scheduling
    )
    assert executor.num_resets == 1
    assert_right(answers)


@pytest.mark.parametrize("where", ["dispatch", "fetch"])
@pytest.mark.parametrize("length", [1, 5, 6, 9, 15])
def test_only_the_culprit_fails(length: int, where: str):
    executor, answers = run(Faults(poison={"r1": length}, where=where))
    assert_right(answers, "r1")
    assert executor.num_resets <= 3


def test_two_culprits_in_one_batch():
    _, answers = run(Faults(poison={"r0": 8, "r3": 9}))
    assert_right(answers, "r0", "r3")


def test_a_dead_device_ends_every_request():
    _, answers = run(lambda n, step: "fetch")
    assert_right(answers, "r0", "r1", "r2", "r3")


def test_a_fault_that_needs_company_does_not_stop_progress():
    executor, answers = run(lambda n, step: "fetch" if step.rows.size > 2 else None)
    assert_right(answers)
    assert executor.num_resets > 1


def test_a_lone_culprit_is_retried_once():
    executor, answers = run(Faults(poison={"r0": 6}), REQUESTS[:1])
    assert answers.by_id["r0"].error == FAILED_ALONE
    assert executor.num_resets == 2


def test_abort_of_the_suspect_that_runs():
    made = make_plan()
    executor = CheckedExecutor(made, lambda n, step: "fetch" if n == 3 else None)
    executor.watch(Scheduler(made))
    engine, answers = EngineCore(executor.scheduler, executor), Answers()
    for request in REQUESTS:
        engine.add_request(request)
        answers.expect(request.request_id)
    while not engine.recovery.active:
        answers.take(engine.step())
    engine.abort(["r3", "r1"])
    while engine.has_work():
        answers.take(engine.step())
    for request in (REQUESTS[0], REQUESTS[2]):
        assert answers.by_id[request.request_id] == run_alone(request, VOCAB_SIZE)
    assert answers.by_id["r3"].finish_reason == answers.by_id["r1"].finish_reason == "abort"


def test_results_of_the_wrong_shape_are_a_failed_step():
    class Careless(CheckedExecutor):
        def fetch(self, handle: ModelRunnerOutput | None) -> ModelRunnerOutput:
            output = super().fetch(handle)
            if self.num_resets:
                return output
            return ModelRunnerOutput(output.step_id, output.token_ids + 1000, output.finite)

    made = make_plan()
    executor = Careless(made)
    executor.watch(Scheduler(made))
    engine, answers = EngineCore(executor.scheduler, executor), Answers()
    engine.add_request(REQUESTS[0])
    answers.expect("r0")
    while engine.has_work():
        answers.take(engine.step())
    assert answers.by_id["r0"] == run_alone(REQUESTS[0], VOCAB_SIZE)


def test_a_reset_that_raises_leaves_the_step():
    class Dead(CheckedExecutor):
        def dispatch(self, plan: SchedulerOutput) -> ModelRunnerOutput | None:
            self.reset = self.fail
            raise RuntimeError("dispatch")

        def fail(self) -> None:
            raise RuntimeError("no device")

    made = make_plan()
    engine = EngineCore(Scheduler(made), Dead(made))
    engine.add_request(REQUESTS[0])
    with pytest.raises(RuntimeError, match="no device"):
        engine.step()
