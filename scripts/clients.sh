#!/usr/bin/env bash
# Real clients and schemathesis, each from its registry into an environment of its own in
# .venv-clients, for tests/clients and tests/server/test_fuzz.py. Does nothing when they are there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

home=.venv-clients
stamp=$home/complete
wanted=$(cksum <scripts/clients.sh)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi
rm -f "$stamp"

twice() { "$@" || { echo "real clients: once more: $*" >&2 && sleep 5 && "$@"; }; } # networks fail

# uv, because pip takes minutes to choose versions for some of them.
if [ ! -x $home/uv/bin/uv ]; then
    .venv/bin/python -m venv $home/uv
    twice $home/uv/bin/python -m pip install --quiet --quiet --disable-pip-version-check uv >&2
fi
uv=$home/uv/bin/uv

install() {
    local name=$1
    shift
    echo "real clients: installing $name" >&2
    $uv venv --quiet --clear --python .venv/bin/python "$home/$name"
    twice $uv pip install --quiet --python "$home/$name/bin/python" "$@" >&2
}

install openai openai==3.52.0
install langchain langchain-openai==1.7.3
install llama_index llama-index-llms-openai-like==0.8.1
install litellm litellm==1.106.2
install anthropic anthropic==2.12.0
install instructor instructor==1.17.0
install agents openai-agents==0.24.0
install lm_eval 'lm-eval[api]==0.4.13' transformers==5.23.0
install schemathesis schemathesis==4.32.5

if command -v npm >/dev/null 2>&1; then
    echo "real clients: installing openai and the AI SDK for Node" >&2
    twice npm install --silent --no-audit --no-fund --prefix $home/node openai@6.49.0 \
        ai@6.0.326 @ai-sdk/openai-compatible@2.0.87 zod@4.6.7 >&2
else
    echo "real clients: no npm on this machine, so none for Node" >&2
fi
echo "$wanted" >"$stamp"
