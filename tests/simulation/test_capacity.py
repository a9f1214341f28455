"""Predictions against what can be worked out by hand, and against a journal's own times."""

from pathlib import Path

import pytest

from jaxllm.config.plan import BatchBucket, BatchKind, EnginePlan
from jaxllm.core.scheduler import Scheduler
from jaxllm.errors import ConfigError
from jaxllm.journal.core import JournaledCore
from jaxllm.journal.file import JournalWriter
from jaxllm.journal.records import Header
from jaxllm.simulation.capacity import CostExecutor, best, predict, summarise, sweep, with_rows
from jaxllm.simulation.capacity_report import errors, plot, table
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.cost import (
    CostTable,
    ProgramCost,
    cost_of_journal,
    read_cost,
    write_cost,
)
from jaxllm.simulation.step_times import StepTimes
from jaxllm.simulation.trace import TraceRequest, journal_times, make_trace, read_trace
from tests.fakes.plans import make_plan, make_request

DECODE, MIXED = BatchKind.DECODE, BatchKind.MIXED


def costs(plan: EnginePlan, decode: float = 0.01, per_token: float = 0.002) -> CostTable:
    programs = tuple(
        ProgramCost(b, decode if b.kind is DECODE else per_token * b.num_tokens, 1)
        for b in plan.buckets
    )
    return CostTable(plan, programs, async_scheduling=False)


def test_one_request_takes_its_prefill_and_its_decode_steps():
    plan = make_plan(max_num_batched_tokens=16)
    made = predict(plan, costs(plan), [TraceRequest(1.0, 16, 11)])
    assert made.ttft_p50 == pytest.approx(0.032)
    assert made.itl_p50 == made.itl_p99 == pytest.approx(0.01)
    assert made.seconds == pytest.approx(0.132)
    assert made.output_tokens_per_second == pytest.approx(11 / 0.132)


def test_rows_are_shared_and_the_queue_waits():
    plan = make_plan(max_num_seqs=4, max_num_batched_tokens=16)
    trace = [TraceRequest(0.0, 4, 11)] * 8
    wide, narrow = (
        predict(plan, costs(plan), trace),
        predict(with_rows(plan, 1), costs(plan), trace),
    )
    assert narrow.seconds > 3 * wide.seconds
    assert wide.ttft_p99 > 0.1 > wide.ttft_p50  # the second four come after the first


def test_what_the_cache_cannot_hold_is_counted():
    plan = make_plan(num_blocks=3)
    made = predict(plan, costs(plan), [TraceRequest(0.0, 4, 4), TraceRequest(0.0, 20, 4)])
    assert made.num_refused == 1 and made.output_tokens_per_second > 0


def test_costs_between_the_measured_ones():
    plan = make_plan()
    measured = (
        ProgramCost(BatchBucket(2, 2, DECODE), 0.1, 1),
        ProgramCost(BatchBucket(6, 6, DECODE), 0.2, 1),
    )
    known = StepTimes(CostTable(plan, measured))
    seconds = [known.seconds(BatchBucket(n, n, DECODE)) for n in (1, 2, 4, 6, 12)]
    assert seconds == pytest.approx([0.1, 0.1, 0.15, 0.2, 0.4])
    assert known.seconds(BatchBucket(6, 4, MIXED)) == 0.2


def test_the_table_survives_the_file(tmp_path: Path):
    plan = make_plan()
    write_cost(costs(plan), tmp_path / "cost.json")
    assert read_cost(tmp_path / "cost.json") == costs(plan)
    (tmp_path / "cost.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a table"):
        read_cost(tmp_path / "cost.json")


def test_traces(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival": 2, "prompt": 3, "output": 4}\n{"arrival": 1, "prompt": 5, "output": 6}'
    )
    assert read_trace(path) == [TraceRequest(1, 5, 6), TraceRequest(2, 3, 4)]
    path.write_text('{"arrival": 2, "prompt": 0, "output": 4}')
    with pytest.raises(ConfigError):
        read_trace(path)
    arrivals = [request.arrival for request in make_trace("b", 50, 10.0)]
    assert arrivals == sorted(arrivals) and 2 < arrivals[-1] < 12


def test_what_came_between_two_turns_came_at_once(tmp_path: Path):
    """To take in a request takes time, but the next step sees them all."""
    plan, clock = make_plan(), VirtualClock()
    journal = JournalWriter(tmp_path / "j", Header(plan, async_scheduling=False), 2**30)
    device = CostExecutor(costs(plan), clock)
    core = JournaledCore(
        Scheduler(plan), device, journal=journal, async_scheduling=False, clock=clock
    )
    for number in range(4):
        clock.advance(0.001)
        core.add_request(make_request(f"r{number}", 3, 5, ignore_eos=True))
        if number == 2:
            core.step()
    while core.has_work():
        core.step()
    arrivals = [request.arrival for request in read_trace(tmp_path / "j")]
    assert arrivals[:3] == [0.0] * 3
    assert arrivals[3] >= 0.003


def test_a_journal_gives_costs_and_trace_and_is_predicted(tmp_path: Path):
    """The engine that wrote it ran on a device of known costs: all of it must come out again."""
    plan, clock = make_plan(max_num_seqs=4), VirtualClock()
    journal = JournalWriter(tmp_path / "j", Header(plan, async_scheduling=False), 2**30)
    core = JournaledCore(
        Scheduler(plan),
        CostExecutor(costs(plan), clock),
        journal=journal,
        async_scheduling=False,
        clock=clock,
    )
    for number in range(12):
        core.add_request(make_request(f"r{number}", 3 + number, 5 + number, ignore_eos=True))
        core.step()
    while core.has_work():
        core.step()
    found = cost_of_journal(tmp_path / "j")
    times = StepTimes(costs(plan))
    assert all(p.seconds == pytest.approx(times.seconds(p.bucket)) for p in found.programs)
    trace = read_trace(tmp_path / "j")
    assert [(r.prompt, r.output) for r in trace] == [(3 + i, 5 + i) for i in range(12)]
    measured = summarise(journal_times(tmp_path / "j"), 4)
    predicted = predict(plan, found, trace)
    assert predicted.seconds == pytest.approx(measured.seconds, rel=0.05)
    assert predicted.ttft_p50 == pytest.approx(measured.ttft_p50, rel=0.2, abs=0.02)
    assert any("output tok/s" in line for line in errors(predicted, measured))


def test_the_sweep_finds_where_more_rows_do_not_help(tmp_path: Path):
    plan = make_plan(max_num_seqs=8, max_num_batched_tokens=16, num_blocks=200)
    programs = tuple(  # a step of more than 4 rows costs as much more as it has rows
        ProgramCost(b, 0.01 * max(1, b.num_tokens / 4), 1) for b in plan.buckets
    )
    predictions = sweep(CostTable(plan, programs), [TraceRequest(0.0, 2, 30)] * 32)
    assert [p.max_num_seqs for p in predictions] == [2, 4, 8]
    assert best(predictions).max_num_seqs == 4
    assert table(predictions)[-1] == "best max_num_seqs: 4"
    plot(predictions, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
