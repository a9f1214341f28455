#!/usr/bin/env bash
# What the server survives, with figures: engines killed and stopped under load, drains under load,
# bad and random requests, random JSON schemas, hundreds of streams.
#
#   scripts/soak.sh [--ci] [DIR]     --ci: a minute's worth; DIR: for the figures, as JSON
#                                    (without --ci it is scripts/bench/results, unless given)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || scripts/setup.sh dev

requests=20000 seconds=60 lives=(--kills 50 --hangs 20 --drains 100 --model-kills 4) results=scripts/bench/results
if [ "${1:-}" = --ci ]; then
    requests=4000 seconds=10 lives=(--kills 4 --hangs 2 --drains 3 --model-kills 0) results=
    shift
else
    scripts/clients.sh || echo "soak: without schemathesis, which could not be installed" >&2
fi
results=${1:-$results}
if [ -n "$results" ]; then mkdir -p "$results"; fi

soak() { # NAME ARGUMENT...
    .venv/bin/python "scripts/soak_$1.py" "${@:2}" ${results:+--json "$results/cpu-$1.json"}
}
soak fuzz --requests $requests
soak schemas --count $((requests / 4))
soak streams --seconds $seconds
soak life "${lives[@]}"
