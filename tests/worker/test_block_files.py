"""Which directory, whose files: the same engine finds its own again, another does not."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxllm.config.engine import EngineConfig
from jaxllm.config.model import AttentionChoice
from jaxllm.weights.resolve import ModelFiles
from jaxllm.worker.block_files import open_block_files
from tests.fakes.tiny_engine import tiny_plan


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    return ModelFiles(model, "hf", model, "m")


def test_the_key_is_the_model_s_and_the_directory_s(tmp_path: Path, files: ModelFiles) -> None:
    config = EngineConfig(model="m", kv_offloading_dir=str(tmp_path / "kv"))
    plan = tiny_plan(kv_files=True)
    keys: list[bytes] = []

    def note(config: EngineConfig, **changes: Any) -> None:
        store, key = open_block_files(config, files, replace(plan, **changes))
        assert store is not None
        store.close()
        keys.append(key)

    note(config)
    note(config)
    assert keys[0] == keys[1]
    inside = replace(config, kv_offloading_dir=str(files.path / "kv"))
    note(inside)
    (files.path / "kv" / "block").write_bytes(b"of an engine before")
    note(inside)
    assert keys.pop() == keys.pop(), "files of blocks are none of the model's"
    note(config, block_size=32)
    note(config, kv_cache_dtype="fp8")
    note(replace(config, kv_offloading_dir=str(tmp_path / "other")))
    os.utime(files.path / "model.safetensors", (1, 1))
    note(config)
    assert len(set(keys)) == 5
    layer = tmp_path / "layer.py"
    chosen = AttentionChoice("causal", layer=str(layer))
    plan = replace(plan, model=replace(plan.model, attention=(chosen,) * plan.model.num_layers))
    for text in ("", "# another"):
        layer.write_text(text)
        note(config)
    assert len(set(keys)) == 7, "the file of a layer may change"


def test_a_second_engine_goes_without(
    tmp_path: Path, files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(model="m", kv_offloading_dir=str(tmp_path / "kv"))
    first, _ = open_block_files(config, files, tiny_plan(kv_files=True))
    with caplog.at_level(logging.WARNING):
        second, key = open_block_files(config, files, tiny_plan(kv_files=True))
    assert first is not None and second is None and len(key) == 32
    assert "another engine" in caplog.text
    first.close()


def test_a_directory_that_cannot_be_had_is_said(
    tmp_path: Path, files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    config = EngineConfig(model="m", kv_offloading_dir=str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        store, _ = open_block_files(config, files, tiny_plan(kv_files=True))
    assert store is None and "not kept" in caplog.text


def test_without_a_directory_every_engine_has_a_key_of_its_own(files: ModelFiles) -> None:
    opened = [open_block_files(EngineConfig(model="m"), files, tiny_plan()) for _ in range(2)]
    assert [store for store, _ in opened] == [None, None]
    assert opened[0][1] != opened[1][1]
