"""Importing jaxllm is quick and brings no JAX."""

import subprocess
import sys
import time
from pathlib import Path

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


def test_host_modules_bring_no_jax() -> None:
    code = (
        "import sys\n"
        "from importlib import import_module\n"
        f"for module in {HOST_MODULES}:\n"
        "    import_module(module)\n"
        "    device = {'jax', 'jaxlib', 'flax', 'orbax', 'torch', 'pallas_kernels'}\n"
        "    if found := device & sys.modules.keys():\n"
        "        sys.exit(f'{module} brings {found}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_jaxllm_takes_under_half_a_second() -> None:
    _seconds("import jaxllm")  # writes the bytecode
    bare = min(_seconds("pass") for _ in range(3))
    imported = min(_seconds("import jaxllm") for _ in range(3))
    assert imported - bare < 0.5
