"""Residual add and RMS norm on a GPU: correctness, then time beside plain XLA.

Run from the repository root: ``PYTHONPATH=. python scripts/bench/gpu_norm.py``.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.bench.ceilings import read_bytes_per_second
from pallas_kernels.bench.norm import NormOperation, norm_call, norm_error, norm_inputs
from pallas_kernels.norm.add_rms_norm_sm90 import NormConfig
from pallas_kernels.norm.specs import SPEED, WIDTHS, NormSpec

RUNS = 10
COMPILERS = 8  # programs compiled at once
MANY = 256  # tokens from which on it may pay that a thread block takes several rows
OPERATION = NormOperation()


def check(width: int) -> str:
    spec, call = NormSpec(100, width), norm_call(NormConfig())
    if error := norm_error(call, spec):
        return error
    if error := norm_error(norm_call(NormConfig(4)), spec):
        return f"4 rows a block: {error}"
    x, branch, weight = norm_inputs(spec)
    normed = call(x, branch, weight)[0]
    grouped = norm_call(NormConfig(4))(x, branch, weight)[0]
    alone = call(x[7:8], branch[7:8], weight)[0][0]
    plain = jax.jit(norm_call(None))(x, branch, weight)[0]
    return (
        f"right; row alone equal {bool((alone == normed[7]).all())}, "
        f"4 rows a block equal {bool((grouped == normed).all())}, "
        f"elements unlike compiled XLA {float((plain != normed).mean()):.2%}"
    )


def configs(spec: NormSpec) -> dict[str, NormConfig | None]:
    rows = (1, 2, 4) if spec.tokens >= MANY else (1,)
    return {f"rows={n}": NormConfig(n) for n in rows} | {"xla": None}


def main() -> None:
    print(jax.__version__, jax.devices()[0].device_kind)
    ceiling = read_bytes_per_second()
    report: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    report["read_tb_per_s"] = ceiling / 1e12
    report["us"] = {str(spec.tokens): {} for spec in SPEED}
    timed = {
        (spec, name): OPERATION.timed(spec, config)
        for spec in SPEED
        for name, config in configs(spec).items()
    }
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = {key: pool.submit(program.dispatch) for key, program in timed.items()}
        report["check"] = {str(width): _attempt(check, width) for width in WIDTHS}
    print(json.dumps(report["check"], indent=1))
    for key, program in timed.items():
        spec, name = key
        error = compiled[key].exception()
        if error is not None:
            print(spec, name, "FAILED", type(error).__name__, str(error)[:600])
            continue
        elapsed = program.seconds(RUNS)
        rate = OPERATION.amount(spec) / elapsed
        report["us"][str(spec.tokens)][name] = round(elapsed * 1e6, 2)
        print(
            f"{OPERATION.label(spec):12s} {name:8s} {elapsed * 1e6:8.2f} us  "
            f"{rate / 1e12:5.2f} TB/s {rate / ceiling:6.1%}",
            flush=True,
        )
    if out := os.environ.get("OUT"):
        Path(out, "gpu_norm.json").write_text(json.dumps(report, indent=1))


def _attempt(function: Any, *args: Any) -> str:
    try:
        return function(*args)
    except Exception as error:  # whatever a compiler raises: one failure must not hide the rest
        return f"FAILED {type(error).__name__}: {str(error)[:600]}"


if __name__ == "__main__":
    main()
