"""Reference answers, made once per test run in the reference environment."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from scripts.parity import TINY
from tests.conformance.reference_env import ROOT, reference_python

PARITY = ROOT / "scripts" / "parity.py"


@pytest.fixture(scope="session")
def reference(request: pytest.FixtureRequest) -> Path:
    """Interpreter of the reference environment."""
    python = request.config.getoption("--reference-python") or reference_python()
    if python is None:
        pytest.skip("no reference environment; make it: python tests/conformance/reference_env.py")
    return python


def run_parity(python: Path, *arguments: str | Path) -> None:
    command = [str(python), str(PARITY), *map(str, arguments)]
    # Beside another test torch's threads mostly wait for each other, and burn the cores with it.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first process of this test run to ask has filled with ``make``."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all processes of the run
    directory, complete = base / f"shared-{name}", base / f"shared-{name}.complete"
    with FileLock(f"{directory}.lock"):
        if not complete.exists():
            directory.mkdir(exist_ok=True)
            make(directory)
            complete.touch()
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoints(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per entry of TINY: the checkpoint transformers made, and its reference.npz."""
    return made_once(
        tmp_path_factory, "tiny", lambda folder: run_parity(reference, "tiny", *TINY, folder)
    )
