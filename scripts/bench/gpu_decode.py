"""Paged decode kernel on a Hopper GPU: TB/s with the default config, the bits of rows alone, in
company and summed by other CTAs, correctness on every edge at once, then TB/s of other configs.

Run from the repository root: PYTHONPATH=. python scripts/bench/gpu_decode.py [--others] [--sweep]
With --correct nothing but the edges, each with the config that serves it. Writes decode.json into
$OUT, if that is set, after every part. MOSAIC_GPU_DUMP_PTXAS=1 shows registers and spills: above
128 registers two CTAs do not fit on an SM.
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.decode_config import DecodeConfig, default_decode_config
from pallas_kernels.attention.decode_plan import DecodePlan, plan_decode
from pallas_kernels.attention.decode_problem import DecodeProblem, make_decode_problem, right_answer
from pallas_kernels.attention.decode_sm90 import paged_decode_sm90
from pallas_kernels.attention.decode_sm90_items import DecodeOp
from pallas_kernels.attention.decode_specs import (
    MIXED,
    SPEED,
    SPEED_LATENTS,
    SPEED_OTHERS,
    DecodeSpec,
)
from pallas_kernels.attention.variant_params import param_arrays
from pallas_kernels.bench.ceilings import read_bytes_per_second
from pallas_kernels.bench.decode import CALLS, decode_inputs
from pallas_kernels.bench.timing import median_seconds
from pallas_kernels.kv_write.narrow import narrow

SWEPT = 4  # specs that see every config
CONFIGS = {
    "default": DecodeConfig(),
    "split 128, chunk 1024": DecodeConfig(128, 1024),
    "split 512, chunk 4096": DecodeConfig(512, 4096),
    "2 stages": DecodeConfig(stages=2),
    "1 CTA/SM, 6 stages": DecodeConfig(stages=6, num_ctas=132),
    "1 CTA/SM, 128 x 3": DecodeConfig(block=128, stages=3, num_ctas=132),
    "4 waves": DecodeConfig(num_ctas=1056),
}
# For pages of less than a stage, whose copies are many and small.
SMALL_PAGES = {
    "2 issuers": DecodeConfig(issuers=2),
    "4 issuers": DecodeConfig(issuers=4),
    "1 CTA/SM, 128 x 3": DecodeConfig(block=128, stages=3, num_ctas=132),
    "the same, 4 issuers": DecodeConfig(block=128, stages=3, num_ctas=132, issuers=4),
    "1 CTA/SM, 6 stages, 4 issuers": DecodeConfig(stages=6, num_ctas=132, issuers=4),
}
# Rows whose bits are compared, alone and in batches: both sides of every seam of summation.
LENGTHS = (1, 255, 256, 257, 1000, 2048, 2049, 9000)
BATCHES = (64, 256)
CTAS = (264, 1, 40, 132, 1056)  # each leads to another work list
KINDS = (
    DecodeSpec("llama", 32, 8, 128, 64, LENGTHS),
    DecodeSpec("gemma window and cap", 16, 8, 128, 16, LENGTHS, window=1000, softcap=30.0),
    DecodeSpec("glm", 32, 2, 128, 64, LENGTHS),
    DecodeSpec("heads of 256", 8, 4, 256, 16, LENGTHS),
)
Results = dict[str, Any]


def make_plan(spec: DecodeSpec, config: DecodeConfig, seq_lens: jax.Array) -> DecodePlan:
    make = functools.partial(
        plan_decode,
        max_pages=spec.width,
        page_size=spec.page,
        num_kv_heads=spec.groups,
        window=spec.window,
        config=config,
    )
    return jax.jit(make)(seq_lens)


def attend(
    spec: DecodeSpec, config: DecodeConfig, q: Any, kv: Any, tables: Any, plan: DecodePlan
) -> jax.Array:
    facts = (spec.dim**-0.5, spec.window, spec.variant, config)
    op = DecodeOp(*facts, value_dim=spec.value_dim)
    params = param_arrays(spec.variant, q.shape[1], q.shape[0], None)
    return paged_decode_sm90(q, kv, tables, plan, params, op=op)


def default_of(spec: DecodeSpec) -> DecodeConfig:
    facts = (spec.stored, spec.page, spec.heads // spec.groups)
    itemsize = jnp.dtype(spec.pages).itemsize
    return default_decode_config(*facts, itemsize=itemsize, value_dim=spec.value_dim)


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the error as text: one failure must not hide the rest."""
    try:
        return function()
    except Exception as error:
        traceback.print_exc()
        return f"FAILED {type(error).__name__}: {str(error)[:300]}"


def save(results: Results) -> None:
    if out := os.environ.get("OUT"):
        (Path(out) / "decode.json").write_text(json.dumps(results, indent=1))


class Run(NamedTuple):
    """A program and what it is called with."""

    program: Any
    args: tuple[Any, ...]
    plan: DecodePlan


def chain(
    spec: DecodeSpec,
    config: DecodeConfig,
    q: jax.Array,
    caches: tuple[jax.Array, ...],
    tables: jax.Array,
    plan: DecodePlan,
) -> jax.Array:
    for i in range(CALLS):
        answers = attend(spec, config, q, caches[i % len(caches)], tables, plan)
        q = jnp.concatenate([answers, q[..., answers.shape[2] :]], axis=2)  # latents give fewer
    return q


def build(spec: DecodeSpec, config: DecodeConfig) -> Run:
    q, caches, tables, lens = decode_inputs(spec, CALLS)
    plan = make_plan(spec, config, lens)
    args = (q, caches, tables, plan)
    function = jax.jit(functools.partial(chain, spec, config))
    return Run(function.lower(*args).compile(), args, plan)


def build_all(specs: list[DecodeSpec], config: DecodeConfig) -> list[Any]:
    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(lambda spec: attempt(lambda: build(spec, config)), specs))


def time_run(
    spec: DecodeSpec,
    name: str,
    run: Any,
    ceiling: float,
    results: Results,
    config: DecodeConfig | None = None,
) -> float:
    """Prints and records a line; returns microseconds, infinity for what did not run."""
    if not isinstance(run, str):
        dispatch = functools.partial(run.program, *run.args)
        seconds = attempt(lambda: median_seconds(dispatch, calls=CALLS))
        if isinstance(seconds, float):
            rate = spec.kv_bytes / seconds / 1e12
            items, left, split_rows = np.asarray(run.plan.counts).tolist()
            entry = {
                "spec": spec.name,
                "name": name,
                "config": dataclasses.asdict(config or CONFIGS[name]),
                "us": seconds * 1e6,
                "tb_per_s": rate,
                "items": items,
                "split_rows": split_rows,
                "temporary_bytes": run.program.memory_analysis().temp_size_in_bytes,
            }
            results["speed"].append(entry)
            print(
                f"{spec.name:28} {name:22} {entry['us']:8.1f} us {rate:5.2f} TB/s "
                f"{rate / ceiling:6.1%} of reading; {items} items, {split_rows} rows split"
                f"{f' into sums of {left}' if split_rows else ''}",
                flush=True,
            )
            return entry["us"]
        run = seconds
    print(f"{spec.name:28} {name:22} {run}", flush=True)
    results["failed"].append(f"{spec.name}, {name}: {run}")
    return float("inf")


def speed_of_default(results: Results) -> float:
    measured = attempt(lambda: read_bytes_per_second() / 1e12)
    ceiling = measured if isinstance(measured, float) else float("nan")
    results["read_tb_per_s"] = measured
    print(f"reading 4 GiB: {measured} TB/s", flush=True)
    runs = build_all(list(SPEED), CONFIGS["default"])
    for spec, run in zip(SPEED, runs, strict=True):
        time_run(spec, "default", run, ceiling, results)
    results["plan_us"] = attempt(plan_us)
    print(f"plan of 256 rows: {results['plan_us']} us", flush=True)
    return ceiling


def plan_us() -> float:
    """The work list of 256 rows and tables of 2048 pages."""
    spec = DecodeSpec("plan", 32, 8, 128, 64, (1024,) * 256, max_pages=2048)

    def plans(lens: jax.Array) -> jax.Array:
        for _ in range(CALLS):  # nothing in a plan is as large as a length
            plan = make_plan(spec, CONFIGS["default"], lens)
            small = plan.items[: lens.shape[0], :4].max(axis=1)
            lens = jnp.maximum(lens, small + plan.split_rows[:, 1:].max() + plan.counts.max())
        return lens

    lens = jnp.asarray(spec.lens, jnp.int32)
    return median_seconds(functools.partial(jax.jit(plans), lens), calls=CALLS) * 1e6


def random_batch(spec: DecodeSpec, rows: int) -> tuple[DecodeProblem, np.ndarray]:
    """``spec``'s rows at random places of a batch of others, and the places. Rows share pages,
    which is allowed; the cache, and all that belongs to ``spec``'s rows, is the same in any batch.
    """
    rng, own = np.random.default_rng(rows), np.random.default_rng(0)
    lens = rng.integers(1, 3000, rows).astype(np.int32)
    tables = rng.integers(1, 1024, (rows, spec.width)).astype(np.int32)
    places = rng.permutation(rows)[: len(spec.lens)]
    lens[places] = spec.lens
    tables[places] = own.integers(1, 1024, (len(places), spec.width))
    keys = jax.random.split(jax.random.key(0), 3)
    kv_shape = (1024, 2, spec.kv_heads, spec.page, spec.stored)
    kv, q, queries = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(
            keys,
            (kv_shape, (rows, spec.heads, spec.dim), (len(places), spec.heads, spec.dim)),
            strict=True,
        )
    )
    q, kv = q.at[places].set(queries), narrow(kv, spec.pages)
    return DecodeProblem(q, kv, jnp.asarray(tables), jnp.asarray(lens)), places


def bits(spec: DecodeSpec, config: DecodeConfig, problem: DecodeProblem) -> tuple[np.ndarray, str]:
    """The answers, and how the work was dealt."""
    q, kv, tables, lens = problem
    plan = make_plan(spec, config, lens)
    items, left, split_rows = np.asarray(plan.counts).tolist()
    out = attend(spec, config, q, kv, tables, plan)
    return np.asarray(out, np.float32), f"{items} items, {split_rows} rows in sums of {left}"


def invariance(spec: DecodeSpec) -> dict[str, Any]:
    """Bits of the same rows: alone, in batches, and with other numbers of CTAs."""
    found: dict[str, Any] = {"spec": spec.name, "lengths": spec.lens, "dealt": {}}
    config = DecodeConfig()
    problem, places = random_batch(spec, BATCHES[0])
    alone = []
    for place in places:
        row = slice(place, place + 1)
        single = DecodeProblem(
            problem.q[row], problem.kv, problem.block_tables[row], problem.seq_lens[row]
        )
        out, dealt = bits(spec, config, single)
        alone.append(out[0])
        found["dealt"][f"alone, {int(problem.seq_lens[place])}"] = dealt
    for rows in BATCHES:
        problem, places = random_batch(spec, rows)
        for ctas in CTAS:
            name = f"{rows} rows, {ctas} CTAs"
            out, dealt = bits(spec, dataclasses.replace(config, num_ctas=ctas), problem)
            found["dealt"][name] = dealt
            found[name] = [bool((out[p] == a).all()) for p, a in zip(places, alone, strict=True)]
    found["all_equal"] = all(all(same) for name, same in found.items() if "CTAs" in name)
    found["finite"] = bool(np.isfinite(alone).all())
    return found


def all_invariance(results: Results) -> None:
    for spec in KINDS:
        found = attempt(functools.partial(invariance, spec))
        results["invariance"].append(found)
        if isinstance(found, str):
            print(f"bits of {spec.name}: {found}", flush=True)
            continue
        print(f"bits of {spec.name}: equal {found['all_equal']}, finite {found['finite']}")
        for name, dealt in found["dealt"].items():
            print(f"  {name:20} {dealt:44} {found.get(name, '')}", flush=True)


def check(spec: DecodeSpec, config: DecodeConfig, problem: DecodeProblem) -> dict[str, Any]:
    plan = make_plan(spec, config, problem.seq_lens)
    q, kv, tables, lens = problem
    got, again = (
        np.asarray(attend(spec, config, q, kv, tables, plan), np.float32) for _ in range(2)
    )
    want = np.asarray(right_answer(spec, problem, spec.dim**-0.5))
    norms = np.maximum(np.linalg.norm(want, axis=(1, 2)), 1e-9)
    error = np.linalg.norm(got - want, axis=(1, 2)) / norms
    # The same rows in another order and half of them empty: what is left must keep its bits.
    order = np.random.default_rng(1).permutation(len(spec.lens))
    kept = jnp.where(jnp.arange(len(order)) % 2 == 0, lens[order], 0)
    moved = attend(spec, config, q[order], kv, tables[order], make_plan(spec, config, kept))
    present = np.asarray(kept) > 0
    same = np.array_equal(np.asarray(moved, np.float32)[present], got[order][present])
    return {
        "worst_row_error": float(error.max()),
        "repeatable": bool(np.array_equal(got, again)),
        "batch_invariant": bool(same),
        "padding_is_zero": not got[np.asarray(lens) == 0].any(),
    }


def correctness(results: Results, *, other_configs: bool = True) -> None:
    """Of every edge with its default, saved as they are found: it takes minutes."""
    with ThreadPoolExecutor(8) as pool:
        problems = dict(zip(MIXED, pool.map(make_decode_problem, MIXED), strict=True))
    cases = [(spec, default_of(spec)) for spec in MIXED]
    if other_configs:
        cases += [(MIXED[0], config) for config in list(CONFIGS.values())[1:]]
        small = [spec for spec in MIXED if spec.page < 64 and spec.dim <= 128]
        cases += [(spec, config) for spec in small for config in SMALL_PAGES.values()]
    tried = [functools.partial(check, spec, config, problems[spec]) for spec, config in cases]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (spec, config), outcome in zip(cases, pool.map(attempt, tried), strict=True):
            entry = {"spec": spec.name, "config": dataclasses.asdict(config), "outcome": outcome}
            results["correct"].append(entry)
            shown = "/".join(str(value) for value in dataclasses.astuple(config))
            print(f"{spec.name:24} {shown:22} {outcome}", flush=True)
            save(results)


def others(results: Results, ceiling: float) -> None:
    """Other pages and head dims; with small pages, every config for them."""
    for spec in (*SPEED_OTHERS, *SPEED_LATENTS):
        more = SMALL_PAGES if spec.page < 64 else {}
        if spec.stored > 128:
            more = {"4 issuers": dataclasses.replace(default_of(spec), issuers=4)} if more else {}
        for name, config in {"default": default_of(spec), **more}.items():
            run = attempt(functools.partial(build, spec, config))
            time_run(spec, name, run, ceiling, results, config)
        save(results)


def sweep(results: Results, ceiling: float) -> None:
    """The specs that every config runs choose the three that the others run."""
    totals = dict.fromkeys(list(CONFIGS)[1:], 0.0)
    for index, spec in enumerate(SPEED):
        names = list(totals) if index < SWEPT else sorted(totals, key=totals.__getitem__)[:3]
        found = {
            name: time_run(
                spec,
                name,
                attempt(functools.partial(build, spec, CONFIGS[name])),
                ceiling,
                results,
            )
            for name in names
        }
        if index < SWEPT:
            for name, us in found.items():  # relative, so that all specs count alike
                totals[name] += us / min(found.values())
        save(results)


def main() -> None:
    begin = time.perf_counter()
    results: Results = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "speed": [],
        "failed": [],
        "invariance": [],
        "correct": [],
    }
    if "--correct" in sys.argv[1:]:
        return correctness(results, other_configs=False)
    ceiling = speed_of_default(results)
    parts: list[Callable[[Results], None]] = [all_invariance, correctness]
    if "--others" in sys.argv[1:]:
        parts.insert(0, functools.partial(others, ceiling=ceiling))
    if "--sweep" in sys.argv[1:]:
        parts.append(functools.partial(sweep, ceiling=ceiling))
    for part in parts:
        save(results)
        print(f"{time.perf_counter() - begin:.0f} s so far", flush=True)
        part(results)
    save(results)
    print(f"took {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
