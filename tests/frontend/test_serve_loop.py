"""The worker's loop with a fake engine and a fake clock."""

import queue
from collections.abc import Sequence
from typing import Any

from jaxllm.messages import (
    AbortRequests,
    EngineCoreOutput,
    EngineCoreRequest,
    EngineStats,
    Ping,
    Shutdown,
    StepOutputs,
    TapValue,
    ToEngine,
)
from jaxllm.sampling_params import SamplingParams
from jaxllm.taps.check import MAX_TAP_BYTES
from jaxllm.worker.serve_loop import ServeLoop, in_parts
from tests.frontend.fake_worker import REFUSED, FakeCore


def request(name: str, prompt: Sequence[int] = (1, 2), max_tokens: int = 3) -> EngineCoreRequest:
    return EngineCoreRequest(name, tuple(prompt), SamplingParams(seed=0), max_tokens)


class Scenario:
    """Messages arrive before the given step; after the last ones, Shutdown when idle."""

    def __init__(self, arrivals: dict[int, list[ToEngine]]):
        self.core = FakeCore()
        self.sent: list[Any] = []
        self.inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self.arrivals = arrivals
        self.now = 0.0
        self._deliver(0)

    def run(self) -> list[Any]:
        ServeLoop(self.core, self.inbox, self._send, clock=lambda: self.now).run()
        return self.sent

    def _deliver(self, step: int) -> None:
        for message in self.arrivals.pop(step, []):
            self.inbox.put(message)

    def _send(self, message: StepOutputs | EngineStats) -> None:
        self.sent.append(message)
        if isinstance(message, StepOutputs):
            self.now += 0.3
            self._deliver(self.core.steps)
        elif not self.core.has_work():
            self.inbox.put(Shutdown())


def test_requests_join_and_leave_between_steps() -> None:
    sent = Scenario({0: [request("a", max_tokens=4)], 1: [request("b")]}).run()
    steps = [m for m in sent if isinstance(m, StepOutputs)]
    names = [sorted([*s.request_ids, *(e.request_id for e in s.events)]) for s in steps]
    assert names == [["a"], ["a", "b"], ["a", "b"], ["a", "b"]]
    assert isinstance(sent[-1], EngineStats) and sent[-1].num_running == 0


def test_a_refused_request_is_answered_and_the_others_go_on() -> None:
    sent = Scenario({0: [request("bad", [REFUSED]), request("good")]}).run()
    refusal = sent[0].events[0]
    assert (refusal.request_id, refusal.finish_reason) == ("bad", "error")
    assert "does not take" in refusal.error
    assert sent[-2].events[0].finish_reason == "length"


def test_a_bug_in_add_request_says_nothing_of_its_inside() -> None:
    scenario = Scenario({0: [request("a", [])]})  # prompt[0] raises IndexError
    assert scenario.run()[0].events[0].error == "The engine could not take this request."


def test_abort_and_shutdown() -> None:
    scenario = Scenario({0: [request("a", max_tokens=99)], 2: [AbortRequests(("a", "nobody"))]})
    scenario.run()
    assert scenario.core.aborted == ["a"] and scenario.core.steps == 2

    stopped = Scenario({0: [request("a", max_tokens=99)], 3: [Shutdown()]})
    stopped.run()
    assert stopped.core.steps == 3


def test_a_ping_is_answered_by_an_idle_engine_only() -> None:
    idle = Scenario({0: [Ping()]}).run()
    assert len(idle) == 1 and isinstance(idle[0], EngineStats)
    busy = Scenario({0: [request("a")], 1: [Ping()]}).run()
    assert list(map(type, busy)) == list(map(type, Scenario({0: [request("a")]}).run()))


def test_stats_about_once_a_second() -> None:
    sent = Scenario({0: [request("a", max_tokens=12)]}).run()
    busy = [m for m in sent[:-1] if isinstance(m, EngineStats)]
    assert 3 <= len(busy) <= 5


def test_taps_of_many_requests_do_not_fill_one_message() -> None:
    half = TapValue("resid.0", 0, bytes(MAX_TAP_BYTES // 2))
    events = [EngineCoreOutput(str(i), taps=(half,) * (i % 3)) for i in range(7)]
    step = StepOutputs(3, ["x"], [1], events, 2.5, num_step_tokens=[8])
    parts = in_parts(step)
    assert [event for part in parts for event in part.events] == events
    assert parts[0].timestamp == 2.5 and all(not part.request_ids for part in parts[1:])
    sizes = [sum(len(v.data) for e in part.events for v in e.taps) for part in parts]
    assert len(parts) == 4 and max(sizes) == MAX_TAP_BYTES
    assert in_parts(StepOutputs(1)) == [StepOutputs(1)]
