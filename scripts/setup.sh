#!/usr/bin/env bash
# Makes .venv with jaxllm installed in it. Does nothing when nothing has changed.
#
#   scripts/setup.sh [EXTRA...]     extras of pyproject.toml: dev, cuda12, cuda13
#
# On a machine with an NVIDIA driver the matching CUDA extra is added by itself.
# PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_suitable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3; do
        if is_suitable "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    cat >&2 <<'TEXT'
error: no Python 3.12 or newer with the venv module was found.
       Install one (Debian and Ubuntu: apt install python3.12 python3.12-venv; macOS: brew install
       python@3.12), or name yours: PYTHON=/path/to/python3.12 scripts/setup.sh
TEXT
    return 1
}

# What the installed driver can run: cuda13, cuda12 or nothing.
cuda_extra() {
    local major
    command -v nvidia-smi >/dev/null 2>&1 || return 0
    major=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1)
    if [ "${major:-0}" -ge 13 ]; then echo cuda13; elif [ "${major:-0}" -eq 12 ]; then echo cuda12; fi
}

extras=("$@")
case " $* " in *" cuda"*) ;; *) extras+=($(cuda_extra)) ;; esac

# The stamp: a checksum of what decides the environment, then the extras that are in it.
stamp=.venv/.jaxllm-setup
wanted=$(cat pyproject.toml constraints.txt | cksum)
installed=""
if [ -x .venv/bin/python ] && [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ]; then
    installed=$(sed -n 2p "$stamp")
    missing=0
    for extra in ${extras[@]+"${extras[@]}"}; do
        case " $installed " in *" $extra "*) ;; *) missing=1 ;; esac
    done
    if [ "$missing" = 0 ]; then exit 0; fi
fi

for extra in $installed; do
    case " ${extras[*]-} " in *" $extra "*) ;; *) extras+=("$extra") ;; esac
done
if ! is_suitable .venv/bin/python; then
    python=$(find_python)
    echo "jaxllm: making .venv with $python" >&2
    "$python" -m venv --clear .venv
fi
list=$(IFS=,; echo "${extras[*]-}")
echo "jaxllm: installing jaxllm${list:+[$list]} into .venv; this takes a minute or two" >&2
.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-input \
    -c constraints.txt -e ".${list:+[$list]}" >&2
printf '%s\n%s\n' "$wanted" "${extras[*]-}" >"$stamp"
