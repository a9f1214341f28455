"""From a configuration to an engine: sizes, and what goes wrong on the way said in one line."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.runner.memory import NO_WORK, Device, WorkingMemory, estimated_memory, memory_plan
from jaxllm.tokenizer.tokenizer import Tokenizer
from jaxllm.worker import memory_report, wiring

FREE_BYTES = 900_000  # of the pretended GPU, beside weights, row buffers and reserve


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """One layer, dummy weights, no tokenizer; JAX stays as the tests have configured it."""
    hf = json.loads((tiny_model_dir / "config.json").read_text())
    hf |= {"num_hidden_layers": 1, "max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    monkeypatch.setattr(wiring, "configure_jax", lambda config, **_: None)
    monkeypatch.setattr(memory_report, "configure_jax", lambda config, **_: None)
    return EngineConfig(
        model=str(tmp_path),
        load_format="dummy",
        max_num_seqs=1,
        max_num_batched_tokens=32,
        block_size=16,
    )


@pytest.fixture
def gpu(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Device:
    """This CPU passed off as a GPU: too small for the estimate, large enough in truth."""
    opened = wiring.open_model(config)
    draft = wiring.draft_programs(config, opened, Device("gpu", 0)).plan
    memory = memory_plan(draft, opened.model, Device("gpu", 0), NO_WORK)
    device = Device("gpu", memory.beside_cache + FREE_BYTES)
    assert estimated_memory(draft).total > FREE_BYTES
    for module in (wiring, memory_report):
        monkeypatch.setattr(module, "this_device", lambda shards: device)
    return device


def test_a_cache_directory_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "file"
    taken.touch()
    monkeypatch.setenv("JAXLLM_CACHE_DIR", str(taken / "cache"))
    monkeypatch.setattr(wiring, "configure_jax", lambda config: None)
    with pytest.raises(ConfigError, match=r"Cannot read or write \S+: Not a directory\."):
        wiring.build_engine(EngineConfig())


def test_code_beside_the_weights_is_never_run(
    config: EngineConfig, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Not even where config.json and tokenizer_config.json ask for it."""
    home, ran = Path(config.model or ""), tmp_path / "ran"
    for name in ("modeling", "configuration", "tokenization", "__init__"):
        (home / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home / name).write_text((tiny_tokenizer_dir / name).read_text())
    for name, kinds in (
        ("config.json", {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization.T", "tokenization.T"]}),
    ):
        said = json.loads((home / name).read_text())
        said |= {"auto_map": kinds, "trust_remote_code": True}
        (home / name).write_text(json.dumps(said))
    wiring.open_model(config)
    assert Tokenizer.from_dir(home).encode("Hi")
    assert not ran.exists()


def test_the_engine_gets_what_the_report_says(
    config: EngineConfig, gpu: Device, caplog: pytest.LogCaptureFixture
) -> None:
    recommended = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 99}
    (Path(config.model) / "generation_config.json").write_text(json.dumps(recommended))
    report = memory_report.memory_report(config)
    with caplog.at_level(logging.INFO):
        engine = wiring.build_engine(config)
    assert report["temporaries"] == f"measured on {jax.devices()[0].device_kind}"
    for name in ("kv_blocks", "kv_tokens", "weight_bytes"):
        assert report[name] == engine.summary[name]
    assert report["temporary_bytes"] == engine.summary["temp_bytes"]
    assert len(report["programs"]) == engine.summary["programs"]
    sizes = [row["temporary_bytes"] for row in report["programs"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == report["temporary_bytes"]
    parts = ("weight", "row_buffer", "temporary", "output", "reserve", "kv_cache", "unused")
    assert sum(report[f"{part}_bytes"] for part in parts) == gpu.limit
    assert 0 <= report["unused_bytes"] < report["kv_block_bytes"]
    info = engine.info
    assert info.sampling_defaults | {"max_new_tokens": info.max_new_tokens} == recommended
    assert "leave it open: temperature 0.6, top_k 20, max_new_tokens 99" in caplog.text
    assert info.cache is not None
    assert info.cache.num_gpu_blocks * info.cache.block_size == report["kv_tokens"]


def test_recommendations_are_checked_before_weights_are_read(config: EngineConfig) -> None:
    (Path(config.model) / "generation_config.json").write_text('{"top_p": "most"}')
    with pytest.raises(ConfigError, match="top_p"):
        wiring.open_model(config)
    for value in ("none", "vllm"):
        opened = wiring.open_model(replace(config, generation_config=value))
        assert not opened.generation.sampling


def test_a_compiler_that_does_not_tell_is_not_believed(
    config: EngineConfig, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = wiring.draft_programs(config, wiring.open_model(config), gpu)
    known = estimated_memory(programs.plan)
    silent = tuple(replace(program, temporary_bytes=0) for program in known.programs)
    monkeypatch.setattr(programs, "measure", lambda threads: WorkingMemory(silent, "measured"))
    with pytest.raises(OutOfMemoryError):  # which the estimate makes of this device
        wiring.size_programs(config, programs, gpu)


def test_a_small_cache_shortens_the_length_nobody_asked_for(
    config: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    small = replace(config, num_gpu_blocks_override=3)
    device = Device("cpu", 10**9)
    programs = wiring.draft_programs(small, wiring.open_model(small), device)
    wiring.size_programs(small, programs, device)
    assert (programs.plan.num_blocks, programs.plan.max_model_len) == (3, 32)
    assert programs.rows.max_blocks == 8192 // 16  # as wide as before, whatever was measured
    assert "max_model_len is 32, not" in caplog.text


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: broken"])
def test_memory_that_something_else_holds_is_noticed_at_the_start(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def fail(*args: Any) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(wiring, "compile_programs", lambda programs, memory: None)
    monkeypatch.setattr(wiring, "ModelRunner", fail)
    kind = OutOfMemoryError if "EXHAUSTED" in message else jax.errors.JaxRuntimeError
    with pytest.raises(kind):
        wiring.build_engine(config)
