#!/usr/bin/env bash
# Format, lint, types and import contracts: everything but the tests. Needs scripts/setup.sh dev.
#
#   scripts/check.sh [--fix]     --fix: format and mend what ruff can
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

if [ "${1:-}" = --fix ]; then
    ruff format .
    ruff check --fix .
else
    ruff format --check .
    ruff check .
fi
pyright --warnings --pythonpath .venv/bin/python
lint-imports
