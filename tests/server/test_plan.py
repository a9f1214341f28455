"""``jaxllm plan``: sizes as people write them, a table, JSON that is nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError
from server import cli
from server.plan import memory_size

ROOT = Path(__file__).parents[2]
REPORT = {
    "model": "m",
    "dtype": "bfloat16",
    "device": "a card",
    "devices": 2,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "limit_bytes": 2**34,
    "weight_bytes": 3 * 2**30,
    "row_buffer_bytes": 2**20,
    "temporary_bytes": 2**28,
    "temporaries": "measured on a card",
    "output_bytes": 2**20,
    "reserve_bytes": 0,
    "kv_cache_bytes": 101 * 2**21,
    "unused_bytes": None,
    "head_dim": 80,
    "cache_head_dim": 128,
    "kv_cache_dtype": "bfloat16",
    "block_size": 16,
    "kv_block_bytes": 2**21,
    "kv_blocks": 101,
    "kv_tokens": 1600,
    "concurrency": [{"tokens": 1024, "requests": 1.56}, {"tokens": 2048, "requests": 0.78}],
    "programs": [{"program": "forward x", "temporary_bytes": 2**28, "output_bytes": 2**20}],
}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("141GB", 141 * 10**9),
        ("80GiB", 80 * 2**30),
        ("143771 MiB", 143771 * 2**20),
        ("1.5tb", 15 * 10**11),
        ("80G", 80 * 10**9),
        ("4096", 4096),
        ("512B", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1GB", "0GB", "1e9", "80 GB of it", "GiB", "8XB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory takes a size"):
        memory_size(text)


def test_a_wrong_size_is_one_line_before_the_engine_is_imported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", "m", "--gpu-memory", "much"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpu-memory takes a size")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, int | None]]:
    seen: list[tuple[EngineConfig, int | None]] = []

    def report(config: EngineConfig, gpu_memory: int | None) -> dict[str, Any]:
        seen.append((config, gpu_memory))
        return REPORT

    monkeypatch.setattr("jaxllm.worker.memory_report.memory_report", report)
    return seen


def test_the_table(
    capsys: pytest.CaptureFixture[str], asked: list[tuple[EngineConfig, int | None]]
) -> None:
    assert cli.main(["plan", "m", "--gpu-memory=80GiB", "--max-num-seqs", "8"]) == 0
    assert asked == [(EngineConfig(model="m", max_num_seqs=8), 80 * 2**30)]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "m in bfloat16 on a card, each of 2: 16.000 GiB for the engine"
    assert "weights 3.000 GiB" in lines
    assert "temporaries 0.250 GiB measured on a card" in lines
    cache = "KV cache 0.197 GiB 101 blocks of 16 tokens, 2.00 MiB each: 1,600 tokens"
    assert f"{cache} in bfloat16; heads of 80 stored as 128, 60% more" in lines
    assert "2,048 tokens 0.78 (max_model_len)" in lines
    assert "forward x 256.0 1.0" in lines
    assert not [line for line in lines if line.startswith("unused")]  # which nobody knows here


def test_json(
    capsys: pytest.CaptureFixture[str], asked: list[tuple[EngineConfig, int | None]]
) -> None:
    assert cli.main(["plan", "m", "--json"]) == 0
    assert asked[0][1] is None
    assert json.loads(capsys.readouterr().out) == REPORT


def test_a_card_that_is_not_here() -> None:
    """The real command. Its output is JSON alone, and it loads nothing: there are no weights."""
    flags = ["--load-format=dummy", "--gpu-memory=141GB", "--gpu-memory-utilization=0.85"]
    model = "configs/models/llama-3.1-8b"
    command = [sys.executable, "-P", "-m", "server", "plan", model, *flags, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert plan["weight_bytes"] == 2 * 8_030_261_248
    assert plan["kv_block_bytes"] == 64 * 131072
    assert plan["kv_tokens"] == 64 * (plan["kv_blocks"] - 1)
    used = sum(plan[f"{part}_bytes"] for part in ("weight", "row_buffer", "temporary", "output"))
    used += plan["reserve_bytes"] + plan["kv_cache_bytes"]
    assert used + plan["unused_bytes"] == plan["limit_bytes"] == 0.85 * 141e9
