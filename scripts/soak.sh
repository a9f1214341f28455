#!/usr/bin/env bash
# What the server survives, with figures: engines killed and stopped under load, drains under load,
# bad and random requests, random JSON schemas, hundreds of streams.
#
#   scripts/soak.sh [--ci]     --ci: a minute's worth
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || scripts/setup.sh dev

python=.venv/bin/python
if [ "${1:-}" = --ci ]; then
    $python scripts/soak_life.py --kills 4 --hangs 2 --drains 3
    $python scripts/soak_fuzz.py --requests 4000
    $python scripts/soak_schemas.py --count 1000
    exec $python scripts/soak_streams.py --seconds 10
fi
scripts/clients.sh || echo "soak: without schemathesis, which could not be installed" >&2
$python scripts/soak_fuzz.py --requests 20000
$python scripts/soak_schemas.py --count 5000
$python scripts/soak_streams.py --seconds 60
exec $python scripts/soak_life.py --kills 50 --hangs 20 --drains 100
