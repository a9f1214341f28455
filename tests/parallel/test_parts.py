"""Parts of models: what each device has, and what cannot be shared out is said by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxllm.config.engine import EngineConfig
from jaxllm.config.model import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.models import get_model
from jaxllm.models.params import model_def
from jaxllm.runner.planning import draft_plan
from jaxllm.worker.memory_report import memory_report
from scripts.parity import tiny_config
from tests.conftest import tiny_hf_config
from tests.fakes.tiny_engine import TINY, tiny_plan

LAYER = """
from jaxllm.layers.attention import Attention
from jaxllm.layers.linear import Linear

class Mine(Attention):
    def __init__(self, config, layer, *, dtype):
        super().__init__(config, layer, dtype=dtype)
        self.o = Linear(config.num_heads * config.head_dim, config.hidden_size, dtype=dtype)
"""


def tiny(name: str) -> ModelConfig:
    return get_model(tiny_config(name)[0]).config_from_hf(tiny_hf_config(name))


@pytest.mark.parametrize(
    ("model", "shards", "reason"),
    [
        (TINY, 4, r"num_key_value_heads \(2\)"),
        (replace(TINY, num_kv_heads=4, intermediate_size=66), 4, r"intermediate_size \(66\)"),
        (replace(TINY, hidden_size=33), 2, r"hidden_size \(33\)"),
        (tiny("deepseek2"), 2, "latent attention"),
        (replace(tiny("deepseek3"), latent=None), 2, "experts"),
    ],
)
def test_a_model_that_cannot_be_cut(model: ModelConfig, shards: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size {shards}: .*{reason}"):
        model.part(shards)


def test_a_part_knows_its_whole() -> None:
    part = TINY.part(2)
    assert (part.num_heads, part.num_kv_heads, part.intermediate_size) == (2, 1, 32)
    assert part.whole == TINY == TINY.part(1)


def test_a_layer_that_knows_nothing_of_other_devices(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(LAYER)
    layers = (f"{tmp_path}/mine.py:Mine",) * TINY.num_layers
    model = replace(TINY, attention_layers=layers)
    assert model_def(model, "float32").names
    with pytest.raises(ConfigError, match=r"attention\.o\.weight does not say how it is shared"):
        model_def(model.part(2), "float32")


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"--taps .* --tensor-parallel-size"):
        EngineConfig(tensor_parallel_size=2, taps=True)
    with pytest.raises(ConfigError, match="--tensor-parallel-size must be at least 1"):
        EngineConfig(tensor_parallel_size=0)


def test_files_of_blocks_are_of_so_many_devices() -> None:
    one, two = tiny_plan(), tiny_plan(model=TINY.part(2))
    assert one.kv_identity != two.kv_identity


def test_memory_is_planned_by_device(tmp_path: Path) -> None:
    """For GPUs that are not here: halves of what is cut, and as much of everything else."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_hf_config("llama")))
    settings: dict[str, Any] = {"model": str(tmp_path), "load_format": "dummy"}
    one, two = (
        memory_report(EngineConfig(tensor_parallel_size=n, **settings), 80 * 10**9) for n in (1, 2)
    )
    assert (one["devices"], two["devices"]) == (1, 2)
    norms = (2 * 3 + 1) * 64 * 2
    assert two["weight_bytes"] - norms == (one["weight_bytes"] - norms) / 2
    assert two["kv_block_bytes"] == one["kv_block_bytes"] / 2
    assert two["row_buffer_bytes"] == one["row_buffer_bytes"]


def test_the_host_keeps_as_many_bytes_of_all_devices_as_of_one() -> None:
    config = EngineConfig(model="m", swap_space=0.25)
    blocks = [
        draft_plan(config, model_def(part, "float32"), "float32", "cpu", ("xla", "")).host_blocks
        for part in (TINY, TINY.part(2))
    ]
    assert blocks[0] == blocks[1] > 0
