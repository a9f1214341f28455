import pytest

from jaxllm.core.invariant import InvariantError
from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.block_files import NoBlockFiles
from jaxllm.engine.engine_core import EngineCore
from jaxllm.errors import ContextLengthExceededError, InvalidRequestError
from jaxllm.simulation.answers import Answers
from jaxllm.simulation.fake_executor import FakeExecutor
from jaxllm.simulation.oracle import run_alone
from tests.fakes.plans import VOCAB_SIZE, make_plan, make_request


def make_engine(*requests, async_scheduling: bool = True, **plan) -> tuple[EngineCore, Answers]:
    made = make_plan(**plan)
    engine = EngineCore(Scheduler(made), FakeExecutor(made), async_scheduling=async_scheduling)
    answers = Answers()
    for request in requests:
        engine.add_request(request)
        answers.expect(request.request_id)
    return engine, answers


def executor_of(engine: EngineCore) -> FakeExecutor:
    assert isinstance(engine.executor, FakeExecutor)
    return engine.executor


class Files(NoBlockFiles):
    """A disk that keeps up."""

    def ending(self) -> bool:
        return True


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_clean_end_keeps_what_was_computed_and_nothing_else(
    interrupted: bool, monkeypatch: pytest.MonkeyPatch
):
    plan, kept = make_plan(kv_files=True, host_blocks=8), list[tuple[int, bytes]]()
    executor = FakeExecutor(plan)
    engine = EngineCore(Scheduler(plan), executor, files=Files(), keep=kept.extend)
    engine.add_request(make_request("a", 40))
    if interrupted:  # after the books say what the step computes

        def interrupt(step: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(executor, "dispatch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        monkeypatch.undo()
    else:
        engine.step()
    engine.close()
    assert bool(kept) != interrupted


def drain(engine: EngineCore, answers: Answers) -> None:
    for _ in range(500):
        if not engine.has_work():
            return
        answers.take(engine.step())
    pytest.fail("the engine does not come to an end")


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_answers_equal_each_request_alone(async_scheduling: bool):
    requests = [make_request(f"r{i}", 3 + 2 * i, 6 + i, seed=i) for i in range(6)]
    engine, answers = make_engine(*requests, async_scheduling=async_scheduling, num_blocks=9)
    drain(engine, answers)
    for request in requests:
        assert answers.by_id[request.request_id] == run_alone(request, VOCAB_SIZE)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().kv_cache_usage == 0.0


def test_the_device_is_kept_one_step_ahead():
    engine, _ = make_engine(make_request("a"))
    assert engine.step() is None  # fills the pipeline
    outputs = engine.step()
    assert outputs is not None and outputs.request_ids == ["a"]
    assert executor_of(engine).num_dispatched == 2


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_what_the_host_does_meanwhile_falls_between_dispatch_and_fetch(
    async_scheduling: bool, monkeypatch: pytest.MonkeyPatch
):
    engine, _ = make_engine(make_request("a", 4, 4), async_scheduling=async_scheduling)
    executor, order = executor_of(engine), list[str]()
    for name in ("dispatch", "fetch"):
        called = getattr(executor, name)
        monkeypatch.setattr(
            executor,
            name,
            lambda given, name=name, call=called: (order.append(name), call(given))[1],
        )
    engine.step()
    order.clear()
    engine.step(lambda: order.append("meanwhile"))
    assert order == ["dispatch", "meanwhile", "fetch"]


def test_without_a_lead_the_first_step_answers():
    engine, _ = make_engine(make_request("a"), async_scheduling=False)
    outputs = engine.step()
    assert outputs is not None and outputs.request_ids == ["a"]
    assert executor_of(engine).num_dispatched == 1


def test_abort_is_told_once_and_the_pipeline_is_drained():
    engine, answers = make_engine(make_request("a"), make_request("b", max_tokens=1))
    answers.take(engine.step())
    engine.abort(["a", "unknown"])
    engine.abort(["a"])
    drain(engine, answers)
    assert answers.by_id["a"].finish_reason == "abort"
    assert answers.by_id["b"].finish_reason == "length"
    assert not executor_of(engine).pending
    assert engine.step() is None


def test_abort_of_the_only_request_is_told_though_nothing_runs():
    engine, answers = make_engine(make_request("a"))
    engine.abort(["a"])
    assert engine.has_work()
    drain(engine, answers)
    assert answers.by_id["a"].finish_reason == "abort"


def test_bad_requests_are_refused_and_harm_nobody():
    good = make_request("good")
    engine, answers = make_engine(good)
    for bad, error in (
        (make_request("empty", ()), InvalidRequestError),
        (make_request("long", 60, 9), ContextLengthExceededError),
        (make_request("vocabulary", (0, VOCAB_SIZE)), InvalidRequestError),
        (make_request("good"), InvalidRequestError),
    ):
        with pytest.raises(error):
            engine.add_request(bad)
    drain(engine, answers)
    assert answers.by_id["good"] == run_alone(good, VOCAB_SIZE)


def test_a_scheduler_that_is_stuck_is_noticed(monkeypatch: pytest.MonkeyPatch):
    engine, _ = make_engine(make_request("a"))
    monkeypatch.setattr(engine.scheduler, "schedule", lambda limit: None)
    with pytest.raises(InvariantError):
        engine.step()


def test_an_idle_engine_has_nothing_to_do():
    engine, _ = make_engine()
    assert not engine.has_work()
    assert engine.step() is None
