"""The figures of a run against a server, from the records of its requests."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.bench.goodput import Goodput
from jaxllm.bench.request_record import RequestRecord

METRICS = ("ttft", "itl", "tpot", "e2e")


def summarize(
    records: Sequence[RequestRecord], seconds: float, goodput: Goodput | None
) -> dict[str, Any]:
    """Latencies in milliseconds; those of failed requests are left out. ``seconds``: the run."""
    good = [record for record in records if record.failure is None]
    prompt_tokens = sum(record.prompt_tokens or 0 for record in good)
    output_tokens = sum(record.num_output_tokens for record in good)
    samples = {
        "ttft": [record.ttft for record in good],
        "itl": [gap for record in good for gap in record.itl],
        "tpot": [record.tpot for record in good if record.tpot is not None],
        "e2e": [record.e2e for record in good],
    }
    figures: dict[str, Any] = {
        "elapsed_seconds": seconds,
        "completed": len(good),
        "failed": len(records) - len(good),
        "failures": dict(Counter(r.failure for r in records if r.failure is not None)),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "tokens_counted_by": _counted_by(good),
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / seconds,
    }
    for name in METRICS:
        figures[f"{name}_ms"] = _distribution(samples[name])
    if goodput is not None:
        met = sum(map(goodput.met_by, good))
        figures["goodput"] = {
            "bounds_ms": {name: bound * 1000 for name, bound in goodput.bounds.items()},
            "met": met,
            "requests_per_second": met / seconds,
        }
    return figures


def _counted_by(good: Sequence[RequestRecord]) -> str:
    """A server that sends no usage leaves nothing to count but chunks."""
    return "chunks" if any(record.output_tokens is None for record in good) else "usage"


def _distribution(samples: Sequence[float]) -> dict[str, float] | None:
    if not samples:
        return None
    p50, p90, p99 = np.percentile(samples, (50, 90, 99)) * 1000
    mean = float(np.mean(samples)) * 1000
    return {"mean": mean, "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def print_summary(report: dict[str, Any]) -> None:
    rate = report["request_rate"]
    print(f"server           {report['base_url']}, model {report['model']}")
    print(
        f"workload         {report['workload']}: {report['n']} requests, "
        f"{report['out_tokens']} tokens asked for, sha {report['sha']}, "
        f"{'all at once' if rate is None else f'{rate:g}/s'}"
    )
    print(f"completed        {report['completed']} in {report['elapsed_seconds']:.2f} s")
    print(f"requests/s       {report['requests_per_second']:.2f}")
    print(f"output tokens/s  {report['output_tokens_per_second']:.1f}")
    print(f"total tokens/s   {report['total_tokens_per_second']:.1f}")
    print(f"{'ms':<8} {'mean':>10} {'p50':>10} {'p90':>10} {'p99':>10}")
    for name in METRICS:
        found = report[f"{name}_ms"]
        values = [found[key] for key in ("mean", "p50", "p90", "p99")] if found else []
        print(f"{name.upper():<8}" + "".join(f" {value:>10.1f}" for value in values))
    if "goodput" in report:
        good = report["goodput"]
        print(f"goodput          {good['requests_per_second']:.2f} requests/s ({good['met']})")
    for kind, count in report["failures"].items():
        print(f"failed           {count}: {kind}")
