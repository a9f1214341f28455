"""Many runs, in several processes: steps spread over seeds and scenarios."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

from jaxllm.simulation.simulation import Simulation


@dataclass(frozen=True, slots=True)
class Run:
    scenario: str
    seed: int
    num_steps: int

    @property
    def command(self) -> str:
        """What makes this run again, and nothing else."""
        return (
            f"scripts/simulate.py --scenario {self.scenario} --seed {self.seed} "
            f"--steps {self.num_steps} --seeds 1"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    run: Run
    num_steps: int  # made, with those that finished what was open
    num_ended: int  # requests whose answer was compared
    num_preemptions: int
    num_deaths: int
    failure: str | None = None


def plan_runs(scenarios: Sequence[str], first_seed: int, seeds: int, num_steps: int) -> list[Run]:
    """One run per seed, the scenarios in turn, ``num_steps`` in all."""
    share = -(-num_steps // seeds)
    return [Run(scenarios[i % len(scenarios)], first_seed + i, share) for i in range(seeds)]


def make_run(run: Run) -> Outcome:
    logging.getLogger("jaxllm.engine").setLevel(logging.CRITICAL)  # faults are meant here
    simulation, failure = Simulation(run.scenario, run.seed), None
    try:
        simulation.run(run.num_steps)
    except Exception as error:  # whatever it is, it is what was looked for
        failure = f"step {simulation.num_steps}: {type(error).__name__}: {error}"
    return Outcome(
        run,
        simulation.num_steps,
        simulation.num_ended,
        simulation.num_preemptions,
        simulation.num_deaths,
        failure,
    )


def run_campaign(runs: Sequence[Run], processes: int) -> Iterator[Outcome]:
    """Outcomes as they come. Whoever stops listening ends it."""
    if processes <= 1:
        yield from map(make_run, runs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(make_run, run) for run in runs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
