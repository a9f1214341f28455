from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from jaxllm.bench.step_costs import measure_costs
from jaxllm.config.plan import BatchBucket, BatchKind
from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.engine_core import EngineCore
from jaxllm.messages import EngineCoreRequest
from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling_params import SamplingParams
from jaxllm.simulation.capacity import predict
from jaxllm.simulation.cost import CostTable, ProgramCost, num_attended
from jaxllm.simulation.fake_executor import FakeExecutor
from jaxllm.simulation.trace import TraceRequest
from tests.fakes.plans import make_plan


class Timed(FakeExecutor):
    """A step takes 1 ms, and 10 us for each pair of tokens."""

    now = 0.0

    def dispatch(self, plan: Any) -> Any:
        return super().dispatch(plan), num_attended(plan)

    def fetch(self, handle: Any) -> Any:
        output, attended = handle
        Timed.now += 0.001 + attended * 1e-5
        return super().fetch(output)


class FakeLLM:
    def __init__(self) -> None:
        self.plan = make_plan(vocab_size=100)
        self.core = EngineCore(Scheduler(self.plan), Timed(self.plan))
        self.info = SimpleNamespace(model="m", vocab_size=100, max_model_len=64)

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[RequestOutput]:
        for i, (prompt, item) in enumerate(zip(prompts, params, strict=True)):
            item = replace(item, seed=0)
            request = EngineCoreRequest(str(i), tuple(prompt), item, item.max_tokens)
            self.core.add_request(request)
        while self.core.has_work():
            self.core.step()
        answers = [CompletionOutput(0, token_ids=[1] * (item.max_tokens or 0)) for item in params]
        return [RequestOutput(str(i), None, [], [a], finished=True) for i, a in enumerate(answers)]


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> CostTable:
    monkeypatch.setattr("jaxllm.bench.step_costs.time.perf_counter", lambda: Timed.now)
    llm: Any = FakeLLM()
    table = measure_costs(llm, 64)
    assert isinstance(llm.core.executor, Timed)
    return table


def test_every_program_is_measured(costs: CostTable) -> None:
    assert {p.bucket for p in costs.programs} == set(costs.plan.buckets)
    for program in costs.programs:
        expected = 0.001 + (program.attended or 0.0) * 1e-5
        assert program.seconds == pytest.approx(expected)


def test_what_was_measured_is_predicted(costs: CostTable) -> None:
    """Lengths that the grid did not have."""
    answer = predict(costs.plan, costs, [TraceRequest(0.0, 33, 20)] * 3)
    core = EngineCore(Scheduler(costs.plan), Timed(costs.plan))
    began = Timed.now
    for i in range(3):
        core.add_request(_request(i))
    while core.has_work():
        core.step()
    assert answer.seconds == pytest.approx(Timed.now - began, rel=0.05)


def _request(number: int) -> EngineCoreRequest:
    params = SamplingParams(seed=0, max_tokens=20, ignore_eos=True)
    return EngineCoreRequest(str(number), (number,) * 33, params, 20, cache_salt=str(number))


def test_context_costs_what_the_line_says() -> None:
    bucket = BatchBucket(2, 2, BatchKind.DECODE)
    table = CostTable(
        make_plan(), (ProgramCost(bucket, 1.0, 5, 10.0), ProgramCost(bucket, 2.0, 5, 20.0))
    )
    seconds = [table.seconds(bucket, attended) for attended in (0, 10, 15, 40)]
    assert seconds == pytest.approx([0.5, 1.0, 1.5, 4.0])
    assert CostTable(make_plan(), (ProgramCost(bucket, 1.0, 5),)).seconds(bucket, 99) == 1.0
