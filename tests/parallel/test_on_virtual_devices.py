"""The tests of ``virtual_devices``, in a process of their own: how many devices a CPU is, JAX asks
once.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.parallel.virtual_devices.conftest import FLAG

HERE = Path(__file__).parent
TIMEOUT_S = 300
# What takes time is compiling: see scripts/test.sh.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


def test_on_virtual_devices() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK} {FLAG}=4"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "virtual_devices")],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
