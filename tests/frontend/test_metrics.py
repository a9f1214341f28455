"""Counts and times of requests, against what can be worked out by hand."""

import pytest

from jaxllm.frontend.histogram import Histogram, bounds_1_2_5
from jaxllm.frontend.metrics import EngineMetrics, merged
from jaxllm.messages import Admission, EngineCoreOutput, StepOutputs
from jaxllm.outputs import RequestMetrics
from tests.fakes.plans import make_request


def test_a_value_belongs_to_the_first_bound_that_holds_it() -> None:
    histogram = Histogram((1, 2, 5))
    for value, count in ((0.5, 1), (1, 2), (1.5, 1), (5, 3), (5.1, 1)):
        histogram.observe(value, count)
    assert histogram.cumulative() == [(1, 3), (2, 4), (5, 7), (float("inf"), 8)]
    assert histogram.sum == pytest.approx(0.5 + 2 + 1.5 + 15 + 5.1)


@pytest.mark.parametrize(
    ("largest", "bounds"), [(1, [1]), (9, [1, 2, 5]), (20, [1, 2, 5, 10, 20]), (100, [])]
)
def test_bounds_reach_the_largest(largest: int, bounds: list[int]) -> None:
    found = bounds_1_2_5(largest)
    assert found == (bounds or [1, 2, 5, 10, 20, 50, 100])


class Timed:
    def __init__(self) -> None:
        self.now = 10.0
        self.metrics = EngineMetrics(1000, clock=lambda: self.now)

    def step(self, timestamp: float, *names: str, **more: object) -> None:
        step = StepOutputs(0, list(names), [7] * len(names), timestamp=timestamp, **more)  # type: ignore[arg-type]
        self.metrics.step(step)


def test_gaps_are_between_tokens_of_the_same_request() -> None:
    t = Timed()
    one, two = make_request("one", 4), make_request("two", 6)
    t.metrics.add((one,), 9.0)
    t.metrics.add((two,), 9.5)
    t.step(1.0, "one", admitted=[Admission("one", 0.25, 0.5), Admission("two", 0.25, 0.5)])
    t.step(2.0, "one", "two")
    t.step(2.5, "one", "two", "unknown")
    assert t.metrics.inter_token_latency.sum == 1.0 + 0.5 + 0.5
    assert t.metrics.inter_token_latency.cumulative()[-1][1] == 3
    assert t.metrics.time_to_first_token.sum == 1.0 + 0.5
    assert t.metrics.num_prompt_tokens == 10
    assert t.metrics.num_generation_tokens == 5
    t.now = 12.0
    t.metrics.end((one,), ("stop",))
    assert t.metrics.e2e_latency.sum == 3.0
    assert t.metrics.queue_time.sum == 0.25
    assert t.metrics.prefill_time.sum == 0.5
    assert t.metrics.decode_time.sum == 1.5
    assert t.metrics.inference_time.sum == 2.0
    assert t.metrics.time_per_output_token.sum == 0.75


def test_one_that_ended_early_is_counted_but_not_measured() -> None:
    t = Timed()
    request = make_request("a")
    t.metrics.add((request,), 9.0)
    t.step(1.0, "a")
    t.metrics.end((request,), ("abort",))
    assert t.metrics.finished["abort"] == 1
    assert t.metrics.e2e_latency.cumulative()[-1][1] == 0
    assert t.metrics.params_n.cumulative()[-1][1] == 0
    t.step(2.0, "a")  # late news of it
    assert t.metrics.num_generation_tokens == 1


def test_one_without_tokens_has_a_prompt() -> None:
    t = Timed()
    request = make_request("a", 5, 0)
    t.metrics.add((request,), 9.0)
    t.step(1.0, events=[EngineCoreOutput("a", finish_reason="length")])
    t.metrics.end((request,), ("length",), num_cached_tokens=4)
    assert (t.metrics.num_prompt_tokens, t.metrics.num_cached_tokens) == (5, 4)
    assert t.metrics.generation_tokens.cumulative()[0] == (1, 1)


def test_several_completions_are_one_request() -> None:
    first = RequestMetrics(1.0, 2.0, 3.0, 5.0, 9.0, 0.5, num_generation_tokens=3)
    second = RequestMetrics(1.0, 2.0, 4.0, 6.0, 8.0, 0.75, num_generation_tokens=2)
    waiting = RequestMetrics(1.0)
    both = merged((first, second, waiting))
    assert both == RequestMetrics(1.0, 2.0, 3.0, 5.0, 9.0, 0.5, num_generation_tokens=5)
    assert (both.queue_time, both.prefill_time, both.decode_time) == (1.0, 2.0, 4.0)
    assert merged((first,)) is first
    assert waiting.queue_time is None
