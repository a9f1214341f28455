"""Two GPUs answer as one does, but for rounding, and alone as in company."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.llm import LLM
from jaxllm.sampling_params import SamplingParams
from tests.conftest import tiny_hf_config, write_tiny_tokenizer
from tests.fakes.variant_requests import logprobs

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 3,
}
LAYERS = {"layers": ["causal", "alibi", {"variant": "head_windows", "params": {}}]}
PROMPTS = [np.random.default_rng(n).integers(0, 256, 300 + 40 * n).tolist() for n in range(4)]


def answers(directory: Path, devices: int) -> tuple[list[list[float]], list[float]]:
    """Log-probabilities of all prompts together, and of the first alone."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, logprobs=0)
    with LLM(
        str(directory),
        attention=str(directory / "layers.json"),
        load_format="dummy",
        dtype="bfloat16",
        tensor_parallel_size=devices,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        max_model_len=512,
        num_gpu_blocks_override=64,
        enable_prefix_caching=False,
    ) as llm:
        together = llm.generate(PROMPTS, params, use_tqdm=False)
        (alone,) = llm.generate(PROMPTS[:1], params, use_tqdm=False)
    return [logprobs(output) for output in together], logprobs(alone)


def test_two_gpus_answer_as_one(tmp_path: Path) -> None:
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs: this machine has one")
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_hf_config("llama") | SIZES))
    (tmp_path / "layers.json").write_text(json.dumps(LAYERS))
    (want, _), (got, alone) = answers(tmp_path, 1), answers(tmp_path, 2)
    assert np.std(np.concatenate(want)) > 0.2
    for one, two in zip(want, got, strict=True):
        np.testing.assert_allclose(two[:-1], one[:-1], atol=0.05)
    assert alone[:-1] == got[0][:-1]
