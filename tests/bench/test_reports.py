"""Both benchmarks over a fake LLM: what is asked of it, what is reported."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxllm.bench import report
from jaxllm.bench.latency import run_latency
from jaxllm.bench.throughput import run_throughput
from jaxllm.bench.workload import workload_a, workload_decode
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError, ContextLengthExceededError, RequestFailedError
from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling_params import SamplingParams
from jaxllm.simulation.cost import CostTable, ProgramCost, read_cost
from tests.fakes.plans import make_plan

VOCAB = 1000
READ_RATE, WEIGHT_BYTES = 1e6, 40_000


class FakeLLM:
    """Gives as many tokens as asked for; a step takes 10 ms on the fake clock."""

    now = 0.0
    missing_tokens = 0

    def __init__(self, **settings: Any):
        self.settings = settings
        self.info = SimpleNamespace(vocab_size=VOCAB, max_model_len=settings["max_model_len"])
        self.plan = make_plan(vocab_size=VOCAB)
        self.summary = {"weight_bytes": WEIGHT_BYTES}
        self.calls: list[tuple[Sequence[list[int]], list[SamplingParams]]] = []
        self.running = True
        FakeLLM.last = self

    def shutdown(self) -> None:
        self.running = False

    def generate(
        self, prompts: Sequence[list[int]], params: list[SamplingParams], use_tqdm: bool = True
    ) -> list[RequestOutput]:
        self.calls.append((prompts, params))
        FakeLLM.now += 0.01 * max(item.max_tokens or 0 for item in params)
        return [
            RequestOutput(
                str(i),
                None,
                prompt,
                [
                    CompletionOutput(
                        0, token_ids=[1] * ((item.max_tokens or 0) - self.missing_tokens)
                    )
                ],
                finished=True,
            )
            for i, (prompt, item) in enumerate(zip(prompts, params, strict=True))
        ]


def _read_rate() -> float:
    assert not FakeLLM.last.running, "the engine still holds its memory"
    return READ_RATE


def _costs(llm: FakeLLM, longest: int) -> CostTable:
    assert llm.running and longest == 27
    return CostTable(llm.plan, (ProgramCost(llm.plan.buckets[0], 0.25, 3, 17.0),))


@pytest.fixture(autouse=True)
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.bench.latency.measured_read_rate", _read_rate)
    monkeypatch.setattr("jaxllm.bench.latency.measure_costs", _costs)
    monkeypatch.setattr("jaxllm.bench.start.LLM", FakeLLM)
    monkeypatch.setattr("jaxllm.bench.throughput.time.perf_counter", lambda: FakeLLM.now)
    monkeypatch.setattr(FakeLLM, "missing_tokens", 0)
    device = {"platform": "cpu", "kind": "fake", "count": 1}
    monkeypatch.setattr(report, "_device", lambda: device)


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    config = EngineConfig(model="m", max_model_len=2048, load_format="dummy")
    run_throughput(config, workload="a", num_prompts=4, output_len=8, json_path=path)
    warm_up, (prompts, params) = FakeLLM.last.calls
    assert len(warm_up[0]) == 2
    assert all(prompt[0] != other[0] for prompt in prompts for other in warm_up[0])
    assert all(0 <= token_id < VOCAB for prompt in prompts for token_id in prompt)
    assert all(item.greedy and item.ignore_eos and item.max_tokens == 8 for item in params)
    assert FakeLLM.last.settings["load_format"] == "dummy"
    written = json.loads(path.read_text())
    work = workload_a(4, 1024, 8)
    assert written["sha"] == work.sha()
    assert written["ids_folded_to_vocabulary"] == VOCAB
    assert written["elapsed_seconds"] == pytest.approx(0.08)
    assert written["requests_per_second"] == pytest.approx(4 / 0.08)
    assert written["output_tokens_per_second"] == pytest.approx(32 / 0.08)
    assert written["total_tokens_per_second"] == pytest.approx((4096 + 32) / 0.08)
    assert {"device", "versions", "command", "commit", "python"} <= written.keys()
    assert written["versions"]["jax"]
    printed = capsys.readouterr().out
    assert work.sha() in printed and "50.00" in printed and "folded" in printed


def test_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    config = EngineConfig(model="m", max_model_len=256, swap_space=1.0)
    run_latency(
        config, batch_sizes=[1, 4], input_len=16, output_len=11, num_iters=2, json_path=path
    )
    written = json.loads(path.read_text())
    assert FakeLLM.last.settings == asdict(
        config
    )  # the programs are those of the engine that serves
    prompts = [tuple(prompt) for run, _ in FakeLLM.last.calls for prompt in run]
    assert len(set(prompts)) == len(prompts)  # or the prefix cache would know them
    assert all(0 <= token_id < VOCAB for prompt in prompts for token_id in prompt)
    assert [row["batch_size"] for row in written["batches"]] == [1, 4]
    for row in written["batches"]:
        assert row["ttft_ms"] == pytest.approx(10)
        assert row["decode_step_ms"] == pytest.approx(10)
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch_size"] * 100)
        assert row["sha"] == workload_decode(row["batch_size"], 16, 11).sha()
        # All but the table of the embedding (float32, 8 wide), and a row of it per token.
        assert row["weight_bytes_read"] == WEIGHT_BYTES - VOCAB * 32 + row["batch_size"] * 32
        # One layer, one head of 8: keys, values of the prompt and 6.5 tokens (between 2 and 11).
        assert row["kv_bytes_read"] == row["batch_size"] * (16 + 6.5) * 2 * 8 * 4
        floor = (row["weight_bytes_read"] + row["kv_bytes_read"]) / READ_RATE * 1000
        assert row["floor_ms"] == pytest.approx(floor)
        assert row["step_to_floor"] == pytest.approx(10 / floor)
    assert read_cost(path).programs[0].seconds == 0.25  # as scripts/simulate.py reads it
    printed = capsys.readouterr().out
    assert "TTFT" in printed and "step/floor" in printed and "0.0 GB/s measured" in printed


def test_a_request_that_ends_early_spoils_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLLM, "missing_tokens", 1)
    with pytest.raises(RequestFailedError, match="1 tokens instead of 2"):
        run_throughput(EngineConfig(model="m", max_model_len=2048), num_prompts=1)


def test_too_long_for_the_engine() -> None:
    with pytest.raises(ContextLengthExceededError, match="--max-model-len"):
        run_throughput(EngineConfig(model="m", max_model_len=64), num_prompts=1)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    config = EngineConfig(model="m", max_model_len=2048)
    with pytest.raises(ConfigError, match="does not exist"):
        run_throughput(config, num_prompts=1, json_path=tmp_path / "none" / "x.json")
    with pytest.raises(ConfigError, match="--json"):
        run_throughput(config, num_prompts=1, json_path=tmp_path)
