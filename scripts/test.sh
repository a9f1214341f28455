#!/usr/bin/env bash
# From a bare clone to a tested one: installs into .venv, checks, and runs every test.
#
#   scripts/test.sh [PYTEST-ARGUMENT...]     for example: scripts/test.sh tests/core -x
#
# The parity tests compare with transformers and torch, which live in .venv-reference. Without
# arguments real clients are installed too, into .venv-clients, and the tests run in two processes,
# those of kernels first; those with limits of time run afterwards, alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh dev

# Both come from the network while the checks take the processor.
logs=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$logs"' EXIT
nice .venv/bin/python tests/conformance/reference_env.py .venv-reference >"$logs/reference" 2>&1 &
reference=$!
clients=
if [ $# = 0 ]; then
    nice scripts/clients.sh >"$logs/clients" 2>&1 &
    clients=$!
fi
scripts/check.sh
if ! wait $reference; then
    cat "$logs/reference" - >&2 <<'TEXT'
################################################################################
# NO REFERENCE ENVIRONMENT: torch or transformers could not be installed (above).
# Parity is checked against the golden files only; the tests that need the real
# transformers are left out. See "Reference environment" in CONTRIBUTING.md.
################################################################################
TEXT
fi
if [ -n "$clients" ] && ! wait $clients; then
    cat "$logs/clients" - >&2 <<'TEXT'
################################################################################
# NO REAL CLIENTS: not all of them could be installed (above). Their tests are
# left out. See "Real clients" in CONTRIBUTING.md.
################################################################################
TEXT
fi

pytest=(.venv/bin/python -m pytest)
if [ $# -gt 0 ]; then
    "${pytest[@]}" "$@"
elif command -v nvidia-smi >/dev/null 2>&1; then # one GPU has room for one JAX
    "${pytest[@]}"
else
    spread=("${pytest[@]}" -m "not alone" -n 2 --dist worksteal)
    # An interpreted kernel is a large program that runs once: to compile it takes most of the time,
    # and half of that when nothing in it is made fast. All else is compiled as it is for users.
    XLA_FLAGS="--xla_backend_optimization_level=0 \
        --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters" "${spread[@]}" tests/kernels
    "${spread[@]}" --ignore tests/kernels
    # Only their files: to collect all the others takes longer than many of them.
    grep -rlw --include='test_*.py' 'mark.alone' tests | xargs "${pytest[@]}" -m alone
fi
