"""The simulation is worth something only if it finds bugs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxllm.simulation.bug_hunt import BugNotPlantedError, hunt_all, patched_source
from jaxllm.simulation.planted_bugs import BUGS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_planted_bug_is_noticed():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/simulate.py"), "--bugs"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(BUGS) >= 30
    assert all(bug.name in done.stdout for bug in BUGS)


def test_what_is_no_bug_is_not_noticed():
    harmless = replace(BUGS[0], old="deque(range(1, num_", new="deque(range(0 + 1, num_")
    for_books = replace(harmless, answers=False)
    for catch in hunt_all([harmless, for_books], processes=2, max_steps=2_000):
        assert catch.check is None
        assert catch.num_steps >= 2_000
        assert catch.books != catch.bug.answers


def test_a_bug_whose_text_is_gone_is_told():
    with pytest.raises(BugNotPlantedError, match="up to date"):
        patched_source(replace(BUGS[0], old="what nobody ever wrote"))
