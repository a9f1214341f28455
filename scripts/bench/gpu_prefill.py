"""Chunked-prefill kernel on a Hopper GPU: TFLOP/s, then correct on mixed batches.

Run from the repository root: PYTHONPATH=. python scripts/bench/gpu_prefill.py [--others]
With --correct nothing but the mixed batches, each with the config that serves it. Writes
prefill.json into $OUT if that is set.
"""

import dataclasses
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.prefill_problem import (
    PrefillProblem,
    make_prefill_problem,
    right_answer,
)
from pallas_kernels.attention.prefill_sm90 import default_prefill_config, paged_prefill_sm90
from pallas_kernels.attention.prefill_specs import MIXED, SPEED, SPEED_OTHERS, PrefillSpec
from pallas_kernels.attention.prefill_tiles import PrefillConfig, make_prefill_tiles
from pallas_kernels.bench.ceilings import matmul_flops_per_second
from pallas_kernels.bench.prefill import CALLS, prefill_inputs
from pallas_kernels.bench.timing import median_seconds

CONFIGS = {
    "default": PrefillConfig(),
    "one head, 128 tokens": PrefillConfig(heads_per_tile=1),
    "no turns": PrefillConfig(take_turns=False),
    "kv 64 x 4": PrefillConfig(block_kv=64, stages=4),
    "one item per block": PrefillConfig(num_ctas=4096),
}


def attend(
    spec: PrefillSpec,
    config: PrefillConfig,
    queries: tuple[jax.Array, ...],
    problem: PrefillProblem,
) -> tuple[jax.Array, ...]:
    """One call per array of queries, on the same cache and tile map."""
    _, kv, block_tables, starts, seq_lens, num_decode_rows = problem
    tiles = make_prefill_tiles(starts, seq_lens, num_decode_rows, spec.tokens, config)
    return tuple(
        paged_prefill_sm90(
            q,
            kv,
            block_tables,
            tiles,
            jnp.zeros_like(q),
            scale=spec.dim**-0.5,
            window=spec.window,
            variant=spec.variant,
            config=config,
        )
        for q in queries
    )


def runner(
    spec: PrefillSpec, config: PrefillConfig, problem: PrefillProblem
) -> Callable[[], np.ndarray]:
    function = jax.jit(functools.partial(attend, spec, config))
    return lambda: np.asarray(function((problem.q,), problem)[0], np.float32)


def check(spec: PrefillSpec, config: PrefillConfig) -> dict[str, Any]:
    problem = make_prefill_problem(spec)
    run = runner(spec, config, problem)
    got, again = run(), run()
    want = np.asarray(right_answer(spec, problem, spec.dim**-0.5))
    outcome = {
        "error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "worst": float(np.abs(got - want).max()),
        "repeatable": bool(np.array_equal(got, again)),
    }
    if config == PrefillConfig() and spec in MIXED[:2]:
        outcome["batch_invariant"] = _rows_alone_agree(spec, config, problem, got)
    return outcome


def _rows_alone_agree(
    spec: PrefillSpec, config: PrefillConfig, problem: PrefillProblem, got: np.ndarray
) -> bool:
    """The last row by itself gives the same bits."""
    row = len(spec.rows) - 1
    start = int(problem.query_start_loc[row])
    new = spec.rows[row][1]
    alone = dataclasses.replace(spec, rows=spec.rows[row:], decode_rows=0, padding=0)
    single = PrefillProblem(
        problem.q[start : start + new],
        problem.kv,
        problem.block_tables[row : row + 1],
        jnp.asarray([0, new], jnp.int32),
        problem.seq_lens[row : row + 1],
        jnp.int32(0),
    )
    return np.array_equal(runner(alone, config, single)(), got[start : start + new])


def median_us(function: Callable[..., Any], *args: Any) -> float:
    """Of one call of the CALLS in ``function``."""
    return median_seconds(lambda: function(*args), calls=CALLS, queued=1) * 1e6


def cudnn_us(spec: PrefillSpec) -> float:
    """Dense attention over contiguous K and V, for rows without context only."""
    length = spec.rows[0][1]
    shape = (len(spec.rows), length, spec.heads, spec.dim)
    keys = jax.random.split(jax.random.key(1), CALLS + 2)
    queries = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[2:]]
    k, v = (
        jax.random.normal(key, (*shape[:2], spec.kv_heads, spec.dim), jnp.bfloat16)
        for key in keys[:2]
    )
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return median_us(jax.jit(lambda qs, k, v: [dense(q, k, v) for q in qs]), queries, k, v)


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the error as text: one failure must not hide the rest."""
    try:
        return function()
    except Exception as error:
        traceback.print_exc()
        return f"FAILED {type(error).__name__}: {str(error)[:300]}"


def default_of(spec: PrefillSpec) -> PrefillConfig:
    return default_prefill_config(spec.heads, spec.kv_heads, spec.stored)


def correctness(results: dict[str, Any], *, other_configs: bool = True) -> None:
    """Saved as they are found: it takes minutes, the oracle compiles anew for every row."""
    cases = [(spec, default_of(spec)) for spec in MIXED]
    if other_configs:
        cases += [(MIXED[0], config) for config in list(CONFIGS.values())[1:]]
        small = [spec for spec in MIXED if spec.page < 64]
        cases += [(spec, dataclasses.replace(default_of(spec), issuers=4)) for spec in small]
    tried = [functools.partial(check, spec, config) for spec, config in cases]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (spec, config), outcome in zip(cases, pool.map(attempt, tried), strict=True):
            results["correct"].append(
                {"spec": spec.name, "config": dataclasses.asdict(config), "outcome": outcome}
            )
            name = next((name for name, other in CONFIGS.items() if other == config), str(config))
            print(f"{spec.name:16} {name:24} {outcome}", flush=True)
            _write(results)


def compiled(spec: PrefillSpec, config: PrefillConfig, inputs: tuple[Any, ...]) -> Any:
    return jax.jit(functools.partial(attend, spec, config)).lower(*inputs).compile()


def speed(
    spec: PrefillSpec, configs: dict[str, PrefillConfig], ceiling: float, results: dict[str, Any]
) -> dict[str, float]:
    """Prints a table; returns the microseconds of the configs that ran."""
    inputs, found = prefill_inputs(spec, CALLS), {}

    def build(config: PrefillConfig) -> Any:
        return attempt(lambda: compiled(spec, config, inputs))

    with ThreadPoolExecutor(len(configs)) as pool:
        programs = list(pool.map(build, configs.values()))
    print(f"\n{spec.name}: {spec.flops / 1e9:.1f} GFLOP", flush=True)
    for (name, config), program in zip(configs.items(), programs, strict=True):
        if isinstance(program, str):
            print(f"  {name:24} {program}", flush=True)
            continue
        us = attempt(functools.partial(median_us, program, *inputs))
        extra = program.memory_analysis().temp_size_in_bytes
        _report(spec, name, us, ceiling, results, dataclasses.asdict(config), extra)
        if not isinstance(us, str):
            found[name] = us
    if all(row == spec.rows[0] and not row[0] for row in spec.rows):
        _report(spec, "cuDNN, dense K and V", attempt(lambda: cudnn_us(spec)), ceiling, results)
    return found


def others(ceiling: float, results: dict[str, Any]) -> None:
    """Other pages and head dims; copies of small pages by several warps too."""
    for spec in SPEED_OTHERS:
        default = default_of(spec)
        configs = {"default": default, "no turns": dataclasses.replace(default, take_turns=False)}
        if spec.page < 64:
            configs["2 issuers"] = dataclasses.replace(default, issuers=2)
            configs["4 issuers"] = dataclasses.replace(default, issuers=4)
        attempt(functools.partial(speed, spec, configs, ceiling, results))


def _report(
    spec: PrefillSpec,
    name: str,
    us: float | str,
    ceiling: float,
    results: dict[str, Any],
    config: dict[str, Any] | None = None,
    temporary_bytes: int | None = None,
) -> None:
    entry: dict[str, Any] = {"spec": spec.name, "name": name, "config": config, "us": us}
    if isinstance(us, str):
        print(f"  {name:24} {us}", flush=True)
    else:
        tflops = spec.flops / us / 1e6
        entry |= {"tflops": tflops, "temporary_bytes": temporary_bytes}
        share = tflops / ceiling
        print(f"  {name:24} {us:9.1f} us {tflops:6.1f} TFLOP/s {share:6.1%} of matmul", flush=True)
    results["speed"].append(entry)


def main() -> None:
    begin = time.perf_counter()
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "correct": [],
        "speed": [],
    }
    if "--correct" in sys.argv[1:]:
        return correctness(results, other_configs=False)
    measured = attempt(lambda: matmul_flops_per_second() / 1e12)
    ceiling = measured if isinstance(measured, float) else float("nan")
    results["matmul_tflops"] = measured
    print(f"matmul 8192^3: {measured} TFLOP/s", flush=True)
    names = list(CONFIGS)
    for spec in SPEED:
        configs = {name: CONFIGS[name] for name in names}
        found = attempt(functools.partial(speed, spec, configs, ceiling, results))
        if spec is SPEED[0] and isinstance(found, dict):  # the others: what may be the fastest
            best = sorted(found, key=lambda name: found[name])[:3]
            names = [name for name in CONFIGS if name in best or CONFIGS[name].num_ctas != 132]
    if "--others" in sys.argv[1:]:
        others(ceiling, results)
    print(f"speed took {time.perf_counter() - begin:.0f} s", flush=True)
    _write(results)
    correctness(results)
    print(f"took {time.perf_counter() - begin:.0f} s", flush=True)
    _write(results)


def _write(results: dict[str, Any]) -> None:
    if out := os.environ.get("OUT"):
        (Path(out) / "prefill.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
