#!/usr/bin/env bash
# From a bare clone to a running server: installs into .venv, then `jaxllm serve "$@"`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/jaxllm" serve "$@"
