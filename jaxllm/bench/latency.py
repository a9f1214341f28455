"""``jaxllm bench latency``: time to the first token and time per step, by batch size; beside the
step the time that reading its bytes takes at best. The report's ``cost`` is for predictions.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from jaxllm.bench.floor import StepBytes, decode_step_bytes, measured_read_rate
from jaxllm.bench.report import check_writable, make_report, write_report
from jaxllm.bench.start import start_engine
from jaxllm.bench.step_costs import measure_costs
from jaxllm.bench.throughput import measure
from jaxllm.bench.workload import Workload, workload_decode
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import InvalidRequestError
from jaxllm.llm import LLM


def run_latency(
    config: EngineConfig,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    input_len: int = 128,
    output_len: int = 64,
    num_iters: int = 3,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Run it, print the figures, return (and write) the report.

    Each run's prompts begin with other tokens, so that the prefix cache knows none of them: the
    engine is the one that serves, and has the same programs.

    Raises:
        JaxLLMError: the arguments are wrong, the engine does not start, or a request failed.
    """
    if min(*batch_sizes, input_len, num_iters) < 1 or output_len < 2:
        raise InvalidRequestError(
            "--batch-size, --input-len and --num-iters must be at least 1, --output-len 2."
        )
    check_writable(json_path)
    llm, start_seconds = start_engine(config, input_len + output_len)
    runs = count(1)
    rows = [_measure(llm, size, input_len, output_len, num_iters, runs) for size in batch_sizes]
    cost = measure_costs(llm, input_len + output_len)
    plan, weight_bytes = llm.plan, int(llm.summary["weight_bytes"])
    llm.shutdown()  # what it takes to measure the floor may not fit beside the engine
    read_rate = measured_read_rate()
    # The steps that are timed see the prompt and all but the first part of the answer.
    context = input_len + (_first_part(output_len) + output_len) / 2
    for row in rows:
        read = decode_step_bytes(plan, weight_bytes, row["batch_size"], context)
        row.update(_floor(read, read_rate, row["decode_step_ms"]))
    figures = {
        "benchmark": "latency",
        "input_len": input_len,
        "output_len": output_len,
        "num_iters": num_iters,
        "start_seconds": round(start_seconds, 2),
        "read_bytes_per_second": read_rate,
        "batches": rows,
        "cost": msgspec.to_builtins(cost),
    }
    report = make_report(config, figures)
    _print(report)
    write_report(report, json_path)
    return report


def _measure(
    llm: LLM,
    batch_size: int,
    input_len: int,
    output_len: int,
    num_iters: int,
    runs: Iterator[int],
) -> dict[str, Any]:
    """Medians over ``num_iters`` runs, after one that does not count.

    The time to the first token is that of requests for one token: until every row of the batch
    has its own. The time of a decode step is what all tokens take longer than the first quarter of
    them, when the prompts are done and every row decodes: the mean interval between engine steps.
    """
    vocab_size = llm.info.vocab_size
    whole = workload_decode(batch_size, input_len, output_len)
    described = {"workload": "decode", "sha": whole.sha()}
    whole = whole.folded(vocab_size)
    first, part = (
        workload_decode(batch_size, input_len, length).folded(vocab_size)
        for length in (1, _first_part(output_len))
    )

    def timed(work: Workload) -> float:
        return measure(llm, work.begun_otherwise(next(runs), vocab_size))

    timed(whole)
    first_seconds, part_seconds, whole_seconds = (
        [timed(work) for _ in range(num_iters)] for work in (first, part, whole)
    )
    steps = output_len - _first_part(output_len)
    decode_seconds = (median(whole_seconds) - median(part_seconds)) / steps
    return {
        "batch_size": batch_size,
        **described,
        "ids_folded_to_vocabulary": whole.folded_to,
        "ttft_ms": median(first_seconds) * 1000,
        "decode_step_ms": decode_seconds * 1000,
        "decode_tokens_per_second": batch_size / decode_seconds if decode_seconds > 0 else None,
        "first_token_seconds": first_seconds,
        "first_part_seconds": part_seconds,
        "whole_seconds": whole_seconds,
    }


def _first_part(output_len: int) -> int:
    return max(output_len // 4, 1)


def _floor(read: StepBytes, read_rate: float, step_ms: float) -> dict[str, float]:
    floor_ms = read.total / read_rate * 1000
    return {
        "weight_bytes_read": read.weights,
        "kv_bytes_read": read.kv,
        "floor_ms": floor_ms,
        "step_to_floor": step_ms / floor_ms,
    }


def _print(report: dict[str, Any]) -> None:
    device = report["device"]
    print(f"model {report['model']} on {device['kind']} ({device['platform']}), ", end="")
    print(f"{report['input_len']} tokens in, {report['output_len']} out")
    gb_per_s = report["read_bytes_per_second"] / 1e9
    print(f"floor: the bytes a decode step must read, at the {gb_per_s:.1f} GB/s measured here")
    print(
        f"{'batch':>6} {'TTFT ms':>10} {'step ms':>10} {'floor ms':>10} {'step/floor':>11}", end=""
    )
    print(f"{'decode tok/s':>14}")
    for row in report["batches"]:
        rate = row["decode_tokens_per_second"] or 0.0
        print(
            f"{row['batch_size']:>6} {row['ttft_ms']:>10.1f} {row['decode_step_ms']:>10.2f} "
            f"{row['floor_ms']:>10.2f} {row['step_to_floor']:>11.2f}{rate:>14.1f}"
        )
