"""The bytes of a decode step, from the real shapes of models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxllm.bench.floor import decode_step_bytes
from jaxllm.config.model import ModelConfig
from jaxllm.models import get_model
from jaxllm.models.params import param_spec
from tests.fakes.plans import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


def _model(name: str) -> ModelConfig:
    hf = json.loads((CONFIGS / name / "config.json").read_text())
    return get_model(hf["architectures"][0]).config_from_hf(hf)


def _sizes(model: ModelConfig) -> dict[str, int]:
    spec = param_spec(model, "bfloat16")
    return {name: leaf.size * leaf.dtype.itemsize for name, leaf in spec.items()}


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-0.6b"])
def test_every_weight_is_read_once_but_the_embedding_s_table(name: str) -> None:
    model = _model(name)
    sizes = _sizes(model)
    tables = [size for name, size in sizes.items() if "embed" in name]
    assert len(tables) == 1
    plan = replace(make_plan(), model=model, dtype="bfloat16")
    read = decode_step_bytes(plan, sum(sizes.values()), 3, 100)
    streamed = sum(sizes.values()) - (0 if model.tie_word_embeddings else tables[0])
    assert read.weights == streamed + 3 * model.hidden_size * 2
    assert read.total == read.weights + read.kv


def test_llama_reads_15_gb_and_128_kib_a_token() -> None:
    model = _model("llama-3.1-8b")
    plan = replace(make_plan(), model=model, dtype="bfloat16")
    read = decode_step_bytes(plan, sum(_sizes(model).values()), 8, 1024)
    assert read.weights == pytest.approx(15.0e9, rel=0.01)
    assert read.kv == 8 * 1024 * 128 * 1024


def test_a_window_bounds_what_its_layers_read() -> None:
    model = replace(_model("qwen3-0.6b"), num_layers=2, sliding_windows=(None, 100))
    plan = replace(make_plan(), model=model, dtype="float32")
    per_token = 2 * model.num_kv_heads * model.head_dim * 4
    assert decode_step_bytes(plan, 10**9, 1, 50.5).kv == 2 * 50.5 * per_token
    assert decode_step_bytes(plan, 10**9, 4, 300).kv == 4 * (300 + 100) * per_token
