"""Is a long computation bound by the card's power? Products of matrices and chunked prefill, each
on random numbers and on zeros, which draw less: TFLOP/s of the first milliseconds after a rest and
of 1.5 s on end, with the clock, watts, and whether the driver said that power holds the clock down.

Run from the repository root: PYTHONPATH=. python scripts/bench/gpu_power.py [--json FILE]
"""

import argparse
import functools
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.prefill_specs import SPEED
from pallas_kernels.bench.prefill import CALLS, prefill_inputs
from scripts.bench import gpu_prefill

SIZE = 8192
SECONDS = 1.5
QUERY = "clocks.sm,power.draw.instant,clocks_event_reasons.sw_power_cap"
Dispatch = Callable[[], Any]


class Watch:
    """What nvidia-smi says of the card every 100 ms."""

    def __enter__(self) -> "Watch":
        asked = [f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-lms", "100"]
        self._process = subprocess.Popen(["nvidia-smi", *asked], stdout=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._lines.extend(line.strip() for line in self._process.stdout)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._reader.join()
        self._process.wait()

    def medians(self) -> dict[str, Any]:
        """Without the first readings, which are of the time before."""
        readings = [line.split(", ") for line in self._lines if line.count(",") == 2][3:]
        capped = sum(reading[2] == "Active" for reading in readings)
        return {
            "mhz": statistics.median(float(reading[0]) for reading in readings),
            "watts": statistics.median(float(reading[1]) for reading in readings),
            "held_by_power": capped / len(readings),
        }


def measured(name: str, flops: float, dispatch: Dispatch) -> dict[str, Any]:
    jax.block_until_ready(dispatch())
    time.sleep(1.0)
    begin = time.perf_counter()
    jax.block_until_ready([dispatch() for _ in range(2)])
    rested = (time.perf_counter() - begin) / 2
    with Watch() as watch:
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < SECONDS:
            jax.block_until_ready([dispatch() for _ in range(4)])
            count += 4
        lasting = (time.perf_counter() - begin) / count
    found = {"after_a_rest": flops / rested / 1e12, "on_end": flops / lasting / 1e12}
    found |= watch.medians()
    print(f"{name:16}", {key: round(value, 2) for key, value in found.items()}, flush=True)
    return found


def products() -> dict[str, Dispatch]:
    numbers = jax.random.normal(jax.random.key(0), (SIZE, SIZE), jnp.bfloat16)
    run = jax.jit(lambda a: [(a * (i + 1)) @ a for i in range(CALLS)])
    return {
        "matmul": functools.partial(run, numbers),
        "matmul, zeros": functools.partial(run, jnp.zeros_like(numbers)),
    }


def prefill() -> dict[str, Dispatch]:
    spec = SPEED[0]
    queries, problem = prefill_inputs(spec, CALLS)
    run = jax.jit(functools.partial(gpu_prefill.attend, spec, gpu_prefill.default_of(spec)))
    zeros = problem._replace(kv=jnp.zeros_like(problem.kv))
    return {
        "prefill": functools.partial(run, queries, problem),
        "prefill, zeros": functools.partial(run, jax.tree.map(jnp.zeros_like, queries), zeros),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    flops = {"matmul": 2 * SIZE**3 * CALLS, "prefill": SPEED[0].flops * CALLS}
    found = {
        name: measured(name, flops[name.split(",")[0]], dispatch)
        for name, dispatch in (products() | prefill()).items()
    }
    if words.json:
        report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **found}
        words.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
