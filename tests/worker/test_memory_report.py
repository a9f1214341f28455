"""What ``jaxllm plan`` says of a device that need not be here."""

import json
from pathlib import Path

import pytest

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import OutOfMemoryError
from jaxllm.runner.memory import GIB, Device
from jaxllm.worker import memory_report
from jaxllm.worker.memory_report import memory_report as report

LLAMA = str(Path(__file__).parents[2] / "configs" / "models" / "llama-3.1-8b")
LLAMA_BYTES = 2 * 8_030_261_248


@pytest.fixture(autouse=True)
def as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_report, "configure_jax", lambda config, **_: None)


def plan(gpu_memory: int | None, model: str = LLAMA, **settings: object) -> dict:
    config = EngineConfig(model=model, load_format="dummy", **settings)  # pyright: ignore
    return report(config, gpu_memory)


def test_a_card_that_is_not_here() -> None:
    found = plan(141 * 10**9, gpu_memory_utilization=0.85)
    assert found["device"] == "a GPU of 141.0 GB"
    assert found["limit_bytes"] == int(141 * 10**9 * 0.85)
    assert found["weight_bytes"] == LLAMA_BYTES
    assert found["kv_block_bytes"] == 64 * 2 * 32 * 8 * 128 * 2
    assert found["temporaries"] == "estimate (upper bound)"
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (256, 8192)
    assert found["concurrency"][0] == {
        "tokens": 1024,
        "requests": round((found["kv_blocks"] - 1) / 16, 2),
    }
    assert [row["tokens"] for row in found["concurrency"]] == [1024, 4096, 8192, 131072]
    assert found["programs"][0]["program"] == "forward mixed[8192 tokens, 256 rows]"


def test_a_cache_of_eight_bits() -> None:
    found, whole = plan(141 * 10**9, kv_cache_dtype="fp8"), plan(141 * 10**9)
    assert (found["dtype"], found["kv_cache_dtype"]) == ("bfloat16", "float8_e4m3fn")
    assert found["kv_block_bytes"] * 2 == whole["kv_block_bytes"]
    assert found["kv_tokens"] > 2 * whole["kv_tokens"] * 0.99


def test_padded_heads_on_a_card_that_is_not_here(tmp_path: Path) -> None:
    """Whether its backend will pad them is not known: the figure is on the safe side."""
    config = json.loads((Path(LLAMA) / "config.json").read_text())
    config |= {"hidden_size": 2560, "head_dim": 80}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan(80 * 10**9, str(tmp_path), max_model_len=4096)
    assert (found["head_dim"], found["cache_head_dim"]) == (80, 128)
    assert found["kv_block_bytes"] == 64 * 2 * 32 * 8 * 128 * 2


def test_a_card_too_small_and_one_with_room_for_a_short_length() -> None:
    with pytest.raises(OutOfMemoryError, match="GiB"):
        plan(16 * 10**9)
    found = plan(26 * 10**9)
    assert found["max_model_len"] == found["kv_tokens"] < 131072
    assert found["concurrency"][-1] == {"tokens": found["max_model_len"], "requests": 1.0}


def test_this_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_report, "this_device", lambda shards: Device("cpu", 64 * GIB))
    found = plan(None, max_model_len=4096)
    assert (found["platform"], found["max_num_seqs"]) == ("cpu", 16)
    assert found["kv_cache_bytes"] <= GIB
    assert found["temporaries"] == "estimate (upper bound)"


@pytest.mark.parametrize(
    ("device", "named", "here"),
    [
        (Device("gpu", int(150.1e9 * 0.92)), 141 * 10**9, True),  # an H200, as it is sold
        (Device("gpu", int(85.5e9 * 0.92)), 80 * 10**9, True),  # an H100
        (Device("gpu", int(150.1e9 * 0.92)), 80 * 10**9, False),
        (Device("gpu", None), 80 * 10**9, False),
        (Device("cpu", int(80e9 * 0.92)), 80 * 10**9, False),
    ],
)
def test_a_card_is_known_by_its_size(device: Device, named: int, here: bool) -> None:
    assert memory_report._is_here(device, named, EngineConfig()) is here
