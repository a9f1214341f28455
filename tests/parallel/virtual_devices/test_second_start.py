"""An engine on several devices that finds its programs on disk."""

import json
from pathlib import Path

import pytest

from jaxllm.llm import LLM
from jaxllm.sampling_params import SamplingParams
from tests.conftest import tiny_hf_config, write_tiny_tokenizer

PROMPT = list(range(20))
SEEDED = SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)


def test_programs_are_read_and_answer_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own code alone, or nothing would be kept: lowered with a mesh, written and read again."""
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "cache"))
    directory = write_tiny_tokenizer(tmp_path / "model")
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 4}
    (directory / "config.json").write_text(json.dumps(tiny_hf_config("llama") | sizes))
    seen = []
    for _ in range(2):
        with LLM(
            str(directory),
            tensor_parallel_size=2,
            load_format="dummy",
            dtype="float32",
            max_num_seqs=2,
            max_num_batched_tokens=32,
            max_model_len=64,
            block_size=16,
            num_gpu_blocks_override=12,
        ) as llm:
            (output,) = llm.generate([PROMPT], SEEDED, use_tqdm=False)
        # Written anew they would be other files.
        kept = {
            path.name: path.stat().st_ino for path in tmp_path.rglob("lowered/*") if path.is_file()
        }
        seen.append((output.outputs[0].token_ids, kept))
    assert seen[0] == seen[1] and len(seen[0][1]) > 3
