"""What a model's makers recommend, read with care."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxllm.errors import ConfigError
from jaxllm.worker.generation_config import GenerationConfig, read_generation_config

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [7, 8]}
SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


def write(directory: Path, values: dict[str, Any]) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (QWEN3, GenerationConfig((7, 8), SAMPLING)),
        ({"top_k": None, "pad_token_id": "?", "max_length": 20, "x": {}}, GenerationConfig()),
        ({"temperature": 1, "top_p": 1.0, "top_k": -1, "min_p": 0}, GenerationConfig()),
        (
            {"temperature": 0.0, "min_p": 0.1},
            GenerationConfig((), {"temperature": 0, "min_p": 0.1}),
        ),
        ({"max_new_tokens": 512}, GenerationConfig((), {}, 512)),
        (
            {"repetition_penalty": 1.05, "eos_token_id": 2},
            GenerationConfig((2,), {"repetition_penalty": 1.05}),
        ),
    ],
)
def test_what_is_read(tmp_path: Path, values: dict[str, Any], expected: GenerationConfig) -> None:
    assert read_generation_config(write(tmp_path, values)) == expected
    ends = read_generation_config(tmp_path, recommends=False)
    assert ends == GenerationConfig(expected.eos_token_ids) and str(ends) == ""


def test_a_model_without_the_file(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.6"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", True),
        ("top_k", 20.5),
        ("min_p", [0.1]),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", "512"),
    ],
)
def test_values_that_cannot_be_used(tmp_path: Path, name: str, value: Any) -> None:
    write(tmp_path, {name: value})
    told = rf"generation_config.json: {name} must .*--generation-config none"
    with pytest.raises(ConfigError, match=told):
        read_generation_config(tmp_path)
    read_generation_config(tmp_path, recommends=False)
