"""Two GPUs answer as one does, but for rounding, and alone as in company."""

import json
from dataclasses import replace
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
PROMPTS = [np.random.default_rng(n).integers(0, 256, 200 + 60 * n).tolist() for n in range(4)]
NEW = 16


def answers(directory: Path, devices: int, **more: Any) -> tuple[Any, Any]:
    """All prompts together, then the first alone: scores of its tokens, and what was drawn."""
    greedy = SamplingParams(
        temperature=0.0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=0, logprobs=0
    )
    seeded = replace(greedy, temperature=1.0, seed=5)
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
        **more,
    ) as llm:
        together = llm.generate(PROMPTS, [greedy, seeded] * 2, use_tqdm=False)
        (alone,) = llm.generate(PROMPTS[:1], greedy, use_tqdm=False)
        core: Any = llm._core
        drawn = core.executor._buffers.last_token
        assert len({np.asarray(shard.data).tobytes() for shard in drawn.addressable_shards}) == 1
    return [logprobs(output) for output in together], logprobs(alone)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs: this machine has one")
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_hf_config("llama") | SIZES))
    (tmp_path / "layers.json").write_text(json.dumps(LAYERS))
    return tmp_path


def test_two_gpus_answer_as_one(directory: Path) -> None:
    """Scores of prompts; what is drawn from them may part where two tokens are as likely."""
    (want, _), (got, alone) = answers(directory, 1), answers(directory, 2)
    assert np.std(np.concatenate(want)) > 0.2
    for one, two in zip(want, got, strict=True):
        np.testing.assert_allclose(two[:-NEW], one[:-NEW], atol=0.05)
    np.testing.assert_allclose(alone[:-NEW], got[0][:-NEW], atol=0.05)  # in a smaller program


def test_blocks_kept_by_the_host_come_back_to_both(directory: Path) -> None:
    """With room for few blocks on the devices, prompts that were there before are found again."""
    (want, _) = answers(directory, 2, enable_prefix_caching=False)
    (got, alone) = answers(directory, 2, swap_space=0.1)
    for one, two in zip(want, got, strict=True):
        np.testing.assert_allclose(two, one, atol=0.05)
    assert alone[-NEW:] == pytest.approx(got[0][-NEW:], abs=0.05)
