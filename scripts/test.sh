#!/usr/bin/env bash
# From a bare clone to a tested one: installs into .venv, checks, and runs every test.
#
#   scripts/test.sh [PYTEST-ARGUMENT...]     for example: scripts/test.sh tests/core -x
#
# The parity tests compare with transformers and torch, which live in .venv-reference.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh dev
scripts/check.sh
if ! .venv/bin/python tests/conformance/reference_env.py .venv-reference; then
    cat >&2 <<'TEXT'
################################################################################
# NO REFERENCE ENVIRONMENT: torch or transformers could not be installed (above).
# Parity is checked against the golden files only; the tests that need the real
# transformers are left out. See "Reference environment" in CONTRIBUTING.md.
################################################################################
TEXT
fi
exec .venv/bin/python -m pytest "$@"
