#!/usr/bin/env python3
"""Run the real scheduler and engine core without a device, in virtual time, from seeds.

    .venv/bin/python scripts/simulate.py --steps 1000000
    .venv/bin/python scripts/simulate.py --scenario pressure --seed 7 --steps 5000 --seeds 1
    .venv/bin/python scripts/simulate.py --bugs
    .venv/bin/python scripts/simulate.py --cost-of run.journal --cost cost.json
    .venv/bin/python scripts/simulate.py --trace other.journal --cost cost.json --plot rows.png
    .venv/bin/python scripts/simulate.py --against throughput.json --cost latency.json

Every step the books are counted again, and every answer is compared with the request run alone. A
failure is told with the one line that makes it again, and the exit code is 1.

With --trace a request trace is served at measured costs: throughput and latencies are predicted for
each --max-num-seqs, and compared with what was measured where the trace is a journal.
"""

import argparse
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

from jaxllm.config.env import cpu_count
from jaxllm.errors import JaxLLMError
from jaxllm.simulation.bug_hunt import hunt_all
from jaxllm.simulation.campaign import Outcome, plan_runs, run_campaign
from jaxllm.simulation.capacity import predict, summarise, sweep, with_rows
from jaxllm.simulation.capacity_report import errors, plot, table
from jaxllm.simulation.cost import cost_of_journal, read_cost, write_cost
from jaxllm.simulation.planted_bugs import BUGS
from jaxllm.simulation.scenarios import SCENARIOS
from jaxllm.simulation.trace import (
    is_journal,
    journal_plan,
    journal_times,
    make_trace,
    read_report,
    read_trace,
    report_trace,
)

STEPS_PER_SEED = 5_000
WORKLOADS = ("a", "b", "decode", "random")


def main() -> int:
    args = _parse()
    try:
        if args.cost_of:
            write_cost(cost_of_journal(args.cost_of), args.cost)
            return 0
        if args.trace:
            return _predict(args)
        if args.against:
            return _predict_report(args)
    except JaxLLMError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    return _simulate(args) if args.bugs is None else _hunt(args.bugs, args.processes)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000, help="of all runs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (%(default)s)")
    parser.add_argument("--seeds", type=int, help=f"runs; default: one per {STEPS_PER_SEED} steps")
    parser.add_argument("--scenario", choices=SCENARIOS, help="default: all in turn")
    parser.add_argument("--processes", type=int, default=cpu_count(), help="(%(default)s)")
    parser.add_argument(
        "--bugs",
        nargs="?",
        const="",
        metavar="NAME",
        help="find planted bugs instead",
    )
    capacity = parser.add_argument_group("capacity", "what would be served, and how fast")
    capacity.add_argument(
        "--trace", help="a journal, JSON lines (arrival, prompt, output), or workload a, b, decode"
    )
    capacity.add_argument(
        "--cost", type=Path, metavar="JSON", help="what steps cost; or a report of bench latency"
    )
    capacity.add_argument("--cost-of", type=Path, metavar="JOURNAL", help="write --cost from it")
    capacity.add_argument("--num-prompts", type=int, help="of a workload")
    capacity.add_argument(
        "--against", type=Path, metavar="JSON", help="predict a run of bench throughput: its report"
    )
    capacity.add_argument("--request-rate", type=float, default=math.inf, help="of a workload")
    capacity.add_argument("--plot", type=Path, metavar="PNG", help="needs matplotlib")
    args = parser.parse_args()
    if (args.trace or args.cost_of or args.against) and not args.cost:
        parser.error("--trace, --against and --cost-of need --cost")
    if min(args.steps, args.processes, args.seeds or 1) < 1:
        parser.error("--steps, --seeds and --processes must be at least 1")
    return args


def _simulate(args: argparse.Namespace) -> int:
    scenarios = [args.scenario] if args.scenario else list(SCENARIOS)
    seeds = args.seeds or -(-args.steps // STEPS_PER_SEED)
    runs = plan_runs(scenarios, args.seed, seeds, args.steps)
    started, outcomes = time.perf_counter(), list[Outcome]()
    with tqdm(total=args.steps, unit="step", unit_scale=True, disable=None) as bar:
        for outcome in run_campaign(runs, min(args.processes, seeds)):
            bar.update(outcome.run.num_steps)
            outcomes.append(outcome)
            if outcome.failure is not None:
                break
    _print_totals(outcomes, time.perf_counter() - started)
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    for outcome in failed:
        print(f"FAILED at {outcome.failure}", file=sys.stderr)
        print(f"again: .venv/bin/python {outcome.run.command}", file=sys.stderr)
    return 1 if failed else 0


def _hunt(name: str, processes: int) -> int:
    """A table of the planted bugs: what noticed them, and whether the books were recounted."""
    missed, bugs = 0, [bug for bug in BUGS if name in bug.name]
    print(f"{'planted bug':<50} {'books':<6} {'noticed by':<14} {'steps':>6}")
    for catch in hunt_all(bugs, processes):
        books, check = "yes" if catch.books else "no", catch.check or "NOBODY"
        print(f"{catch.bug.name:<50} {books:<6} {check:<14} {catch.num_steps:>6}", flush=True)
        missed += catch.check is None
    print(f"{len(bugs)} bugs planted, {missed} times nobody noticed")
    return 1 if missed else 0


def _predict(args: argparse.Namespace) -> int:
    costs, path = read_cost(args.cost), Path(args.trace)
    workload = args.trace if args.trace in WORKLOADS else None
    if workload:
        trace = make_trace(workload, args.num_prompts, args.request_rate)
    else:
        trace = read_trace(path)
    print(f"{len(trace)} requests at the costs of {costs.source}")
    predictions = sweep(costs, trace)
    print("\n".join(table(predictions)))
    if args.plot:
        plot(predictions, args.plot)
    if not workload and is_journal(path):
        rows = journal_plan(path).max_num_seqs
        predicted = predict(with_rows(costs.plan, rows), costs, trace)
        print("\n".join(errors(predicted, summarise(journal_times(path), rows))))
    return 0


def _predict_report(args: argparse.Namespace) -> int:
    """The same requests with the same settings, and what was measured beside it."""
    costs, report = read_cost(args.cost), read_report(args.against)
    predicted = predict(costs.plan, costs, report_trace(report))
    rates = report["output_tokens_per_second"], predicted.output_tokens_per_second
    for title, one, other in (
        ("seconds", report["elapsed_seconds"], predicted.seconds),
        ("output tok/s", *rates),
    ):
        print(f"{title:>14}  measured {one:9.2f}  predicted {other:9.2f}  {other / one - 1:+.1%}")
    return 0


def _print_totals(outcomes: list[Outcome], seconds: float) -> None:
    steps = sum(outcome.num_steps for outcome in outcomes)
    ended = sum(outcome.num_ended for outcome in outcomes)
    preemptions = sum(outcome.num_preemptions for outcome in outcomes)
    deaths = sum(outcome.num_deaths for outcome in outcomes)
    print(
        f"{steps} steps of {len(outcomes)} runs in {seconds:.1f} s ({steps / seconds:.0f}/s): "
        f"{ended} answers compared, {preemptions} preemptions, {deaths} deaths of the engine"
    )


if __name__ == "__main__":
    sys.exit(main())
