"""Paged decode kernel on a Hopper GPU: correct on every edge at once, then TB/s.

Run from the repository root: PYTHONPATH=. python scripts/bench/gpu_decode.py
Writes decode.json into $OUT if that is set. MOSAIC_GPU_DUMP_PTXAS=1 shows registers and spills:
above 128 registers two CTAs do not fit on an SM.
"""

import dataclasses
import functools
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.decode_config import DecodeConfig, default_decode_config
from pallas_kernels.attention.decode_plan import DecodePlan, plan_decode
from pallas_kernels.attention.decode_problem import DecodeProblem, make_decode_problem, right_answer
from pallas_kernels.attention.decode_sm90 import DecodeOp, paged_decode_sm90
from pallas_kernels.attention.decode_specs import MIXED, SPEED, DecodeSpec

CALLS = 32  # chained in one dispatch, as the layers of a model: hides the host's share
QUEUED = 3  # dispatches per sample
RUNS = 20
CACHE_BYTES = 1 << 29  # of the different caches of one chain: far more than L2
SWEPT = 4  # specs that see every config
CONFIGS = {
    "default": DecodeConfig(),
    "split 1024": DecodeConfig(split_tokens=1024),
    "split 512": DecodeConfig(split_tokens=512),
    "split 4096": DecodeConfig(split_tokens=4096),
    "2 stages": DecodeConfig(stages=2),
    "1 CTA/SM, 6 stages": DecodeConfig(stages=6, num_ctas=132),
    "1 CTA/SM, 128 x 3": DecodeConfig(block=128, stages=3, num_ctas=132),
    "1 CTA/SM, 128 x 3, split 1024": DecodeConfig(1024, 128, 3, 132),
    "4 waves": DecodeConfig(num_ctas=1056),
}


def make_plan(spec: DecodeSpec, config: DecodeConfig, seq_lens: jax.Array) -> DecodePlan:
    return plan_decode(
        seq_lens,
        max_pages=spec.width,
        page_size=spec.page,
        window=spec.window,
        config=config,
    )


def make_op(spec: DecodeSpec, config: DecodeConfig) -> DecodeOp:
    return DecodeOp(spec.dim**-0.5, spec.window, spec.softcap, config)


def default_of(spec: DecodeSpec) -> DecodeConfig:
    return default_decode_config(spec.dim, spec.page, spec.heads // spec.kv_heads)


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the error as text: one failure must not hide the rest."""
    try:
        return function()
    except Exception as error:
        traceback.print_exc()
        return f"FAILED {type(error).__name__}: {str(error)[:300]}"


def check(spec: DecodeSpec, config: DecodeConfig, problem: DecodeProblem) -> dict[str, Any]:
    plan, op = make_plan(spec, config, problem.seq_lens), make_op(spec, config)
    q, kv, tables, lens = problem
    got, again = (
        np.asarray(paged_decode_sm90(q, kv, tables, plan, op=op), np.float32) for _ in range(2)
    )
    want = np.asarray(right_answer(spec, problem, op.scale))
    norms = np.maximum(np.linalg.norm(want, axis=(1, 2)), 1e-9)
    error = np.linalg.norm(got - want, axis=(1, 2)) / norms
    # The same rows in another order and half of them empty: what is left must keep its bits.
    order = np.random.default_rng(1).permutation(len(spec.lens))
    kept = jnp.where(jnp.arange(len(order)) % 2 == 0, lens[order], 0)
    moved = paged_decode_sm90(q[order], kv, tables[order], make_plan(spec, config, kept), op=op)
    present = np.asarray(kept) > 0
    same = np.array_equal(np.asarray(moved, np.float32)[present], got[order][present])
    return {
        "worst_row_error": float(error.max()),
        "repeatable": bool(np.array_equal(got, again)),
        "batch_invariant": bool(same),
        "padding_is_zero": not got[np.asarray(lens) == 0].any(),
    }


def correctness(results: dict[str, Any]) -> None:
    with ThreadPoolExecutor(8) as pool:
        problems = dict(zip(MIXED, pool.map(make_decode_problem, MIXED), strict=True))
    cases = [(spec, default_of(spec)) for spec in MIXED]
    cases += [(MIXED[0], config) for config in list(CONFIGS.values())[1:]]
    tried = [functools.partial(check, spec, config, problems[spec]) for spec, config in cases]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(attempt, tried))
    for (spec, config), outcome in zip(cases, found, strict=True):
        entry = {"spec": spec.name, "config": dataclasses.asdict(config), "outcome": outcome}
        results["correct"].append(entry)
        shown = "/".join(str(value) for value in dataclasses.astuple(config))
        print(f"{spec.name:24} {shown:16} {outcome}", flush=True)


def median_us(function: Callable[..., Any], calls: int, *args: Any) -> float:
    """Of one of the ``calls`` in ``function``."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready([function(*args) for _ in range(QUEUED)])
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / (QUEUED * calls) * 1e6


def read_ceiling() -> float:
    """TB/s of XLA reading 4 GiB once."""
    data = jnp.zeros((1 << 30,), jnp.float32)
    us = median_us(jax.jit(lambda x: x.sum()), 1, data)
    return data.nbytes / us / 1e6


def chain(
    op: DecodeOp, q: jax.Array, caches: tuple[jax.Array, ...], tables: jax.Array, plan: DecodePlan
) -> jax.Array:
    for i in range(CALLS):
        q = paged_decode_sm90(q, caches[i % len(caches)], tables, plan, op=op)
    return q


def speed_inputs(spec: DecodeSpec) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array, jax.Array]:
    used = [-(-length // spec.page) for length in spec.lens]
    rng = np.random.default_rng(0)
    pages = rng.permutation(sum(used)).astype(np.int32) + 1
    tables = np.zeros((len(used), spec.width), np.int32)
    for row, (count, end) in enumerate(zip(used, np.cumsum(used), strict=True)):
        tables[row, :count] = pages[end - count : end]
    sets = min(CALLS, max(2, CACHE_BYTES // spec.kv_bytes))
    keys = jax.random.split(jax.random.key(0), sets + 1)
    shape = (sum(used) + 1, 2, spec.kv_heads, spec.page, spec.dim)
    make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
    q = jax.random.normal(keys[-1], (len(used), spec.heads, spec.dim), jnp.bfloat16)
    caches = tuple(make(key) for key in keys[:sets])
    return q, caches, jnp.asarray(tables), jnp.asarray(spec.lens, jnp.int32)


def speed(
    spec: DecodeSpec, names: list[str], ceiling: float, results: dict[str, Any]
) -> dict[str, float]:
    """Prints a table; returns the microseconds of the configs that ran."""
    q, caches, tables, lens = speed_inputs(spec)
    plans = {name: make_plan(spec, CONFIGS[name], lens) for name in names}

    def build(name: str) -> Any:
        function = jax.jit(functools.partial(chain, make_op(spec, CONFIGS[name])))
        return attempt(lambda: function.lower(q, caches, tables, plans[name]).compile())

    with ThreadPoolExecutor(len(names)) as pool:
        programs = dict(zip(names, pool.map(build, names), strict=True))
    print(f"\n{spec.name}: {spec.kv_bytes / 1e6:.0f} MB", flush=True)
    found: dict[str, float] = {}
    for name, program in programs.items():
        if not isinstance(program, str):
            run = functools.partial(median_us, program, CALLS, q, caches, tables, plans[name])
            outcome = attempt(run)
            if isinstance(outcome, float):
                found[name] = outcome
                _report(spec, name, outcome, program, ceiling, results)
                continue
            program = outcome
        print(f"  {name:32} {program}", flush=True)
    return found


def _report(
    spec: DecodeSpec, name: str, us: float, program: Any, ceiling: float, results: dict[str, Any]
) -> None:
    rate = spec.kv_bytes / us / 1e6
    results["speed"].append(
        {
            "spec": spec.name,
            "name": name,
            "config": dataclasses.asdict(CONFIGS[name]),
            "us": us,
            "tb_per_s": rate,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        }
    )
    print(f"  {name:32} {us:8.1f} us {rate:5.2f} TB/s {rate / ceiling:6.1%} of reading", flush=True)


def plan_us() -> float:
    """The work list of 256 rows and tables of 2048 pages."""
    spec = DecodeSpec("plan", 32, 8, 128, 64, (1024,) * 256, max_pages=2048)
    lens = jnp.asarray(spec.lens, jnp.int32)

    def plans(lens: jax.Array) -> jax.Array:
        for _ in range(CALLS):
            plan = make_plan(spec, CONFIGS["default"], lens)
            lens = jnp.maximum(lens, plan.items[: lens.shape[0], 3] * 0 + plan.row_splits)
        return lens

    return median_us(jax.jit(plans), CALLS, lens)


def main() -> None:
    begin = time.perf_counter()
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "correct": [],
        "speed": [],
    }
    correctness(results)
    print(f"correctness took {time.perf_counter() - begin:.0f} s", flush=True)
    measured = attempt(read_ceiling)
    ceiling = measured if isinstance(measured, float) else float("nan")
    results["read_tb_per_s"], results["plan_us"] = measured, attempt(plan_us)
    print(f"reading 4 GiB: {measured} TB/s; plan: {results['plan_us']} us", flush=True)
    totals = dict.fromkeys(CONFIGS, 0.0)
    for index, spec in enumerate(SPEED):
        names = list(CONFIGS) if index < SWEPT else sorted(totals, key=totals.__getitem__)[:3]
        found = attempt(functools.partial(speed, spec, names, ceiling, results))
        if index < SWEPT and isinstance(found, dict):
            for name in CONFIGS:  # time relative to the spec's best, so that all specs count alike
                best = min(found.values(), default=1.0)
                totals[name] += found.get(name, float("inf")) / best
    print(f"took {time.perf_counter() - begin:.0f} s", flush=True)
    if out := os.environ.get("OUT"):
        (Path(out) / "decode.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
