"""What the engine tells about time and work, by a clock that the test sets."""

from typing import Any

import pytest

from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.engine_core import EngineCore
from jaxllm.messages import Admission, Compilations, StepOutputs
from jaxllm.simulation.fake_executor import FakeExecutor
from tests.fakes.plans import make_plan, make_request


class SetClock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time


def engine_at(clock: SetClock, **plan: Any) -> EngineCore:
    made = make_plan(**plan)
    executor = FakeExecutor(made, not_finite={"nan": 1})
    return EngineCore(
        Scheduler(made),
        executor,
        async_scheduling=False,
        clock=clock,
        compilations=lambda: Compilations(1, 2, 3),
    )


def steps(engine: EngineCore, clock: SetClock) -> list[StepOutputs]:
    """Until the end; each takes a second."""
    told: list[StepOutputs] = []
    while engine.has_work():
        clock.time += 1
        outputs = engine.step()
        if outputs is not None:
            told.append(outputs)
    return told


def test_waiting_counts_from_arrival_to_the_first_place() -> None:
    clock = SetClock()
    engine = engine_at(clock, max_num_seqs=1)
    engine.add_request(make_request("first", max_tokens=3))
    clock.time += 0.5
    engine.add_request(make_request("second", max_tokens=1))
    told = steps(engine, clock)
    assert [outputs.timestamp for outputs in told] == [101.5, 102.5, 103.5, 104.5]
    assert told[0].admitted == [Admission("first", 100.0, 101.5)]
    assert told[1].admitted == told[2].admitted == []
    assert told[3].admitted == [Admission("second", 100.5, 104.5)]


def test_one_that_was_preempted_is_told_once() -> None:
    clock = SetClock()
    engine = engine_at(clock, num_blocks=9)
    for i in range(6):
        engine.add_request(make_request(f"r{i}", 3 + 2 * i, 6 + i))
    told = [a.request_id for outputs in steps(engine, clock) for a in outputs.admitted]
    assert engine.stats().num_preemptions > 0
    assert sorted(told) == [f"r{i}" for i in range(6)]


def test_cached_tokens_are_told_with_the_first_token() -> None:
    clock = SetClock()
    engine = engine_at(clock)
    size = engine.scheduler.plan.block_size
    prompt = tuple(range(1, 2 * size + 2))
    for name in ("a", "b"):
        engine.add_request(make_request(name, prompt, 3))
        first = steps(engine, clock)[0]
        cached = 0 if name == "a" else 2 * size
        assert [a.num_cached_tokens for a in first.admitted] == [cached]
        assert first.request_ids == [name]


def test_one_that_ends_in_the_queue_is_forgotten() -> None:
    clock = SetClock()
    engine = engine_at(clock)
    engine.add_request(make_request("a"))
    engine.abort(["a", "unknown"])
    assert [outputs.admitted for outputs in steps(engine, clock)] == [[]]
    assert engine._queue_times._queued_ts == {}


def test_chunks_that_tell_nothing_are_told_later() -> None:
    clock = SetClock()
    engine = engine_at(clock, max_num_batched_tokens=8, max_num_seqs=4)
    engine.add_request(make_request("a", 20, 2))
    told = steps(engine, clock)
    assert told[0].admitted == [Admission("a", 100.0, 101.0)]
    assert sum(told[0].num_step_tokens) == 20 and len(told[0].num_step_tokens) > 1
    assert told[1].num_step_tokens == [1]


def test_tokens_and_padding_add_up() -> None:
    clock = SetClock()
    engine = engine_at(clock)
    engine.add_request(make_request("a", 5, 3))
    assert isinstance(engine.executor, FakeExecutor)
    steps(engine, clock)
    stats = engine.stats()
    assert stats.num_tokens == 5 + 2
    assert stats.num_token_slots == sum(s.bucket.num_tokens for s in engine.executor.steps)
    assert stats.num_token_slots > stats.num_tokens
    assert stats.compilations == Compilations(1, 2, 3)


@pytest.mark.parametrize(("request_id", "expected"), [("nan", 1), ("fine", 0)])
def test_corrupted_requests_are_counted(request_id: str, expected: int) -> None:
    clock = SetClock()
    engine = engine_at(clock)
    engine.add_request(make_request(request_id))
    steps(engine, clock)
    assert engine.stats().num_corrupted == expected
