"""Reference answers, made once per session in the reference environment."""

import subprocess
from pathlib import Path

import pytest

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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stderr[-4000:]}")


@pytest.fixture(scope="session")
def tiny_checkpoints(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per entry of TINY: the checkpoint transformers made, and its reference.npz."""
    directory = tmp_path_factory.mktemp("tiny")
    run_parity(reference, "tiny", *TINY, directory)
    return directory
