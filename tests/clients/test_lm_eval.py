"""lm-eval scores texts through the API: prompts of token ids, echo, and log-probabilities."""

import json
import math
import os
import subprocess
from pathlib import Path

import httpx
import pytest

from jaxllm.tokenizer.tokenizer import Tokenizer
from jaxllm.weights.default_model import default_model_dir
from tests.clients.conftest import HOME, need_clients, quiet_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEXTS = (
    "The capital of France is Paris, which lies on the river Seine.",
    "Water boils at a hundred degrees.",
)
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


def own_perplexity(url: str, tokenizer: Tokenizer, prefix: int) -> float:
    """Of a word, as lm-eval defines it: the prefix token is given and not scored."""
    total = 0.0
    for text in TEXTS:
        ids = [prefix, *tokenizer.encode(text, add_special_tokens=False)]
        body = {"model": "smollm2-135m", "prompt": ids, "echo": True, "logprobs": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 0}, timeout=60)
        total += sum(answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:])
    return math.exp(-total / sum(len(text.split()) for text in TEXTS))


def test_perplexity(default_url: str, tmp_path: Path) -> None:
    need_clients()
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    directory = default_model_dir()
    model = {
        "model": "smollm2-135m",
        "base_url": f"{default_url}/v1/completions",
        "tokenizer": directory,
        "max_length": 256,
        "num_concurrent": 2,
    }
    command = [
        HOME / "lm_eval" / "bin" / "lm_eval", "run", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in model.items()),
        "--tasks", "tiny", "--include_path", tmp_path, "--output_path", tmp_path / "out.json",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        env=quiet_environment() | {"HF_HOME": str(tmp_path / "hf"), "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("out*.json")
    results = json.loads(written.read_text())
    theirs = results["results"]["tiny"]["word_perplexity,none"]
    tokenizer = Tokenizer.from_dir(directory)
    (prefix,) = tokenizer.encode("<|im_start|>", add_special_tokens=False)
    assert theirs == pytest.approx(own_perplexity(default_url, tokenizer, prefix), rel=1e-3)
