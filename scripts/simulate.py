#!/usr/bin/env python3
"""Run the real scheduler and engine core without a device, in virtual time, from seeds.

    .venv/bin/python scripts/simulate.py --steps 1000000
    .venv/bin/python scripts/simulate.py --scenario pressure --seed 7 --steps 5000 --seeds 1
    .venv/bin/python scripts/simulate.py --bugs

Every step the books are counted again, and every answer is compared with the request run alone. A
failure is told with the one line that makes it again, and the exit code is 1.
"""

import argparse
import sys
import time

from tqdm import tqdm

from jaxllm.config.env import cpu_count
from jaxllm.simulation.bug_hunt import hunt_all
from jaxllm.simulation.campaign import Outcome, plan_runs, run_campaign
from jaxllm.simulation.planted_bugs import BUGS
from jaxllm.simulation.scenarios import SCENARIOS

STEPS_PER_SEED = 5_000


def main() -> int:
    args = _parse()
    return _hunt(args.processes) if args.bugs else _simulate(args)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000, help="of all runs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (%(default)s)")
    parser.add_argument("--seeds", type=int, help=f"runs; default: one per {STEPS_PER_SEED} steps")
    parser.add_argument("--scenario", choices=SCENARIOS, help="default: all in turn")
    parser.add_argument("--processes", type=int, default=cpu_count(), help="(%(default)s)")
    parser.add_argument("--bugs", action="store_true", help="find the planted bugs instead")
    args = parser.parse_args()
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


def _hunt(processes: int) -> int:
    """A table of the planted bugs: what noticed them, with the books recounted and without."""
    missed = 0
    print(f"{'planted bug':<50} {'books':<6} {'noticed by':<14} {'steps':>6}")
    for catch in hunt_all(BUGS, processes):
        books, check = "yes" if catch.books else "no", catch.check or "NOBODY"
        print(f"{catch.bug.name:<50} {books:<6} {check:<14} {catch.num_steps:>6}", flush=True)
        missed += catch.check is None
    print(f"{len(BUGS)} bugs planted, {missed} times nobody noticed")
    return 1 if missed else 0


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
