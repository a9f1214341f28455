import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.simulation.campaign import make_run, plan_runs
from jaxllm.simulation.scenarios import SCENARIOS
from jaxllm.simulation.simulation import Simulation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL, logger="jaxllm.engine.engine_core")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_answer_equals_the_request_run_alone(scenario: str):
    outcomes = [make_run(run) for run in plan_runs([scenario], 0, 6, 3000)]
    assert not [outcome for outcome in outcomes if outcome.failure is not None]
    assert sum(outcome.num_ended for outcome in outcomes) > 200


def test_scenarios_do_what_they_say():
    def played(scenario: str) -> Simulation:
        simulation = Simulation(scenario, 1)
        simulation.run(1000)
        return simulation

    assert played("pressure").num_preemptions > 100
    assert played("deaths").num_deaths > 3
    assert played("faults").executor.num_resets > 3


def test_a_run_follows_from_its_seed():
    one, other = Simulation("random", 3), Simulation("random", 3)
    for simulation in (one, other):
        simulation.run(300)
    assert one.clock.now() == other.clock.now()
    assert one.num_ended == other.num_ended > 10


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/simulate.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_tells_what_it_did():
    done = simulate("--steps", "600", "--seeds", "4", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ steps of 4 runs .* answers compared", done.stdout)


def test_a_failure_comes_with_the_line_that_makes_it_again(tmp_path: Path):
    """Here the scheduler is broken by a module that every Python process of ours imports."""
    (tmp_path / "sitecustomize.py").write_text(
        "from jaxllm.core.block_pool import BlockPool\n"
        "BlockPool.num_free = property(lambda self: len(self._blank) - 1)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    script = [sys.executable, str(ROOT / "scripts/simulate.py")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*script, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    done = run("--steps", "900", "--seeds", "3", "--processes", "1")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("again: ")]
    arguments = shlex.split(line)[3:]
    again = run(*arguments, "--processes", "1")
    assert again.returncode == 1
    (failure,) = [line for line in done.stderr.splitlines() if line.startswith("FAILED")]
    assert failure in again.stderr
