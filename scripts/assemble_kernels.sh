#!/usr/bin/env bash
# Assembles the kernels for Hopper without a GPU, in an environment of its own: scripts/assemble_kernels.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=.venv-assembler/bin
if [ ! -e .venv-assembler/complete ]; then
    .venv/bin/python -m venv .venv-assembler
    jax=$(.venv/bin/python -c 'import jax; print(jax.__version__)')
    # Without what they need to run on a GPU.
    $bin/python -m pip install --quiet --disable-pip-version-check "jax==$jax" filelock jaxtyping >&2
    $bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
        "jax-cuda13-plugin==$jax" "jax-cuda13-pjrt==$jax" nvidia-cuda-nvcc nvidia-cuda-nvdisasm >&2
    touch .venv-assembler/complete
fi
PYTHONPATH=. exec $bin/python scripts/assemble_kernels.py "$@"
