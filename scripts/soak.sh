#!/usr/bin/env bash
# What the server survives, with figures: engines killed and stopped under load, drains under load.
#
#   scripts/soak.sh [--ci]     --ci: a minute's worth
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || scripts/setup.sh dev

if [ "${1:-}" = --ci ]; then
    exec .venv/bin/python scripts/soak_life.py --kills 4 --hangs 2 --drains 3
fi
exec .venv/bin/python scripts/soak_life.py --kills 50 --hangs 20 --drains 100
