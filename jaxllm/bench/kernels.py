"""``jaxllm bench kernels``: the operations of pallas_kernels beside what the device can do at best.

What runs on the device is in pallas_kernels/bench, which is imported by name, as an LLM imports its
engine: this room brings no JAX.
"""

from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxllm.bench.report import check_writable, make_device_report, write_report
from jaxllm.config.engine import EngineConfig
from jaxllm.config.env import prepare_accelerator

OPERATIONS = ("decode", "prefill", "kv_write", "sampling", "norm", "gated_matmul")
RATES = {"byte": "B/s", "flop": "FLOP/s"}


def run_kernels(
    *, operations: Sequence[str] = OPERATIONS, json_path: Path | None = None
) -> dict[str, Any]:
    """Measure them, print the figures, return (and write) the report.

    A kernel that fails is a row with its ``failure``; one that does not take a shape here gives way
    to plain XLA, and the row says why.

    Raises:
        ConfigError: the file cannot be written.
    """
    check_writable(json_path)
    prepare_accelerator(EngineConfig.__dataclass_fields__["gpu_memory_utilization"].default)
    suite: Any = import_module("pallas_kernels.bench.suite")
    cases = suite.cases(dict.fromkeys(operations))
    with tqdm(total=len(cases) + 1, desc="Ceilings", unit="shape") as bar:
        ceilings = import_module("pallas_kernels.bench.ceilings").measure_ceilings()
        bar.update()
        rows: list[dict[str, Any]] = []
        for case in cases:
            bar.set_description(f"{case.op}: {case.shape}")
            rows.append(asdict(suite.measure(case, ceilings)))
            bar.update()
    figures = {"benchmark": "kernels", "ceilings": ceilings._asdict(), "rows": rows}
    report = make_device_report(figures)
    _print(report)
    write_report(report, json_path)
    return report


def _print(report: dict[str, Any]) -> None:
    device, ceilings, rows = report["device"], report["ceilings"], report["rows"]
    reads = _rate(ceilings["read_bytes_per_second"], "byte")
    multiplies = _rate(ceilings["matmul_flops_per_second"], "flop")
    print(f"{device['kind']} ({device['platform']}): reads {reads}, bfloat16 products {multiplies}")
    width = max((len(row["shape"]) for row in rows), default=0) + 2
    heads = f"{'us':>10}{'rate':>18}{'ceiling':>9}{'busy us':>10}{'busy rate':>18}"
    print(f"{'operation':<14}{'shape':<{width}}{'path':<8}{heads}")
    for row in rows:
        print(f"{row['op']:<14}{row['shape']:<{width}}{row['path']:<8}{_figures(row)}")
    refusals = dict.fromkeys((row["op"], why) for row in rows for why in row["refused"])
    for op, why in refusals:
        print(f"{op}: {why}")


def _figures(row: dict[str, Any]) -> str:
    if row["failure"] is not None:
        return f"  FAILED {row['failure']}"
    if row["seconds"] is None:
        return f"{'-':>10}{'-':>18}{'-':>9}"
    rate = _rate(row["rate"], row["unit"])
    figures = f"{row['seconds'] * 1e6:>10.1f}{rate:>18}{row['of_ceiling']:>9.1%}"
    if row["busy_seconds"] is None:
        return figures
    return figures + f"{row['busy_seconds'] * 1e6:>10.1f}{_rate(row['busy_rate'], row['unit']):>18}"


def _rate(per_second: float, unit: str) -> str:
    prefix, scale = ("T", 1e12) if per_second >= 1e11 else ("G", 1e9)
    return f"{per_second / scale:.3g} {prefix}{RATES[unit]}"
