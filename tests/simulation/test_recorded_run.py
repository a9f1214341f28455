"""What one run on an H200 measured of its steps predicts how long its workloads took."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jaxllm.simulation.capacity import predict
from jaxllm.simulation.cost import CostTable
from jaxllm.simulation.trace import report_trace

RECORD = Path(__file__).parents[2] / "scripts/bench/results/h200-rows-1.json"


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return {name: part.get("figures") for name, part in json.loads(RECORD.read_text()).items()}


@pytest.fixture(scope="module")
def costs(parts: dict[str, Any]) -> CostTable:
    """The run's table did not tell reading from computing, and had no full decode program with long
    contexts: these are beside it, as the latency of batches.
    """
    latency, programs = parts["latency"], list[dict[str, Any]]()
    for old in latency["cost"]["programs"]:
        work = "read" if old["bucket"]["kind"] == "decode" else "pairs"
        programs.append(old | {work: old["attended"]})
    context = latency["input_len"] + 5 / 8 * latency["output_len"]  # of what was timed
    for batch in latency["batches"]:
        rows = batch["batch_size"]
        bucket = {"num_tokens": rows, "num_rows": rows, "kind": "decode"}
        steps = 3 * latency["output_len"] // 4
        seconds = batch["decode_step_ms"] / 1000
        programs.append(
            {"bucket": bucket, "seconds": seconds, "steps": steps, "read": rows * context}
        )
    plan = latency["cost"]["plan"] | {"cache_head_dims": ()}
    return msgspec.convert({"plan": plan, "programs": programs}, CostTable)


@pytest.mark.parametrize("workload", ["workload-a", "workload-b"])
def test_workloads_take_as_long_as_predicted(
    parts: dict[str, Any], costs: CostTable, workload: str
) -> None:
    report = parts[workload]
    predicted = predict(costs.plan, costs, report_trace(report))
    assert predicted.seconds == pytest.approx(report["elapsed_seconds"], rel=0.05)
