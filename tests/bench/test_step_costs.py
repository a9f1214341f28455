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
from jaxllm.simulation.cost import CostTable, ProgramCost, Work, work_of
from jaxllm.simulation.fake_executor import FakeExecutor
from jaxllm.simulation.step_times import StepTimes
from jaxllm.simulation.trace import TraceRequest
from tests.fakes.plans import make_plan

READ_S, PAIR_S = 1e-5, 1e-7


class Timed(FakeExecutor):
    """A step takes 1 ms, 10 us for each token of context that a decoding row reads, and 0.1 us for
    each pair of tokens in a chunk.
    """

    now = 0.0

    def dispatch(self, plan: Any) -> Any:
        return super().dispatch(plan), work_of(plan.starts, plan.num_new_tokens)

    def fetch(self, handle: Any) -> Any:
        output, work = handle
        Timed.now += 0.001 + work.read * READ_S + work.pairs * PAIR_S
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
        expected = 0.001 + program.read * READ_S + program.pairs * PAIR_S
        assert program.seconds == pytest.approx(expected)


def test_full_decode_programs_are_measured_with_long_contexts(costs: CostTable) -> None:
    """Also where the prompts of so many rows take more steps than answers have tokens."""
    for bucket in costs.plan.buckets:
        if bucket.kind is BatchKind.DECODE:
            reads = [p.read for p in costs.programs if p.bucket == bucket]
            assert max(reads) > 30 * bucket.num_rows
            assert min(reads) < 25 * bucket.num_rows


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


def test_rates_are_found_apart_and_a_poor_point_does_not_set_them() -> None:
    small, large = (BatchBucket(n, n, BatchKind.DECODE) for n in (2, 4))
    mixed = BatchBucket(8, 4, BatchKind.MIXED)
    measured = (
        ProgramCost(small, 2.0, 5, 10.0),
        ProgramCost(small, 4.0, 5, 30.0),
        ProgramCost(large, 2.0, 1, 10.0),  # as good as the same amount of work: tells no rate
        ProgramCost(large, 9.0, 1, 11.0),
        ProgramCost(mixed, 5.0, 5, 10.0, 100.0),
        ProgramCost(mixed, 6.0, 5, 10.0, 200.0),
    )
    times = StepTimes(CostTable(make_plan(), measured))
    found = [times.seconds(small, Work(read)) for read in (10, 20, 50)]
    assert found == pytest.approx([2.0, 3.0, 6.0])
    rises = [times.seconds(b, Work(110)) - times.seconds(b, Work(10)) for b in (small, large)]
    assert rises == pytest.approx([10.0, 10.0])
    assert times.seconds(mixed, Work(30, 300)) == pytest.approx(9.0)


def test_one_point_is_what_a_program_costs() -> None:
    bucket = BatchBucket(2, 2, BatchKind.DECODE)
    times = StepTimes(CostTable(make_plan(), (ProgramCost(bucket, 1.0, 5),)))
    assert times.seconds(bucket, Work(99, 99)) == 1.0
