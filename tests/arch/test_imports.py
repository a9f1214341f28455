"""Importing jaxllm is quick and brings no JAX; the rooms import only what they may."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HOST_MODULES = (
    "jaxllm",
    "jaxllm.async_llm",
    "jaxllm.config.engine",
    "jaxllm.core.scheduler",
    "jaxllm.engine.engine_core",
    "jaxllm.frontend.client",
    "jaxllm.journal.replay",
    "jaxllm.llm",
    "jaxllm.messages",
    "jaxllm.outputs",
    "jaxllm.sampling_params",
    "jaxllm.simulation.simulation",
    "jaxllm.tokenizer.tokenizer",
    "server.app",
    "server.cli",
)


def _seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - started


def test_import_contracts() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", HOST_MODULES)
def test_host_module_brings_no_jax(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "found = {'jax', 'jaxlib', 'flax', 'orbax', 'torch', 'pallas_kernels'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(found)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{module} brings {done.stderr}"


def test_importing_jaxllm_takes_under_half_a_second() -> None:
    _seconds("import jaxllm")  # writes the bytecode
    bare = min(_seconds("pass") for _ in range(3))
    imported = min(_seconds("import jaxllm") for _ in range(3))
    assert imported - bare < 0.5
