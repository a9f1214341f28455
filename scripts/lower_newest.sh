#!/usr/bin/env bash
# Lowers the kernels for CUDA on the newest JAX there is, without a GPU, in an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv-newest/bin/python ]; then .venv/bin/python -m venv .venv-newest; fi
.venv-newest/bin/python -m pip install --quiet --quiet --disable-pip-version-check --upgrade \
    jax filelock jaxtyping numpy pytest pytest-timeout pytest-xdist hypothesis >&2
.venv-newest/bin/python -c 'import jax; print("lowering on JAX", jax.__version__)'
exec .venv-newest/bin/python -m pytest -q -n 2 --dist worksteal -k lower \
    tests/kernels/test_decode_sm90.py \
    tests/kernels/test_variants.py tests/kernels/test_prefill_sm90.py tests/kernels/test_sampling_sm90.py \
    tests/kernels/test_kv_write_sm90.py tests/kernels/test_norm_sm90.py \
    tests/kernels/test_gated_matmul_sm90.py tests/kernels/test_latent_prefill_sm90.py
