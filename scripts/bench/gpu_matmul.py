"""Skinny matrix products on a GPU: correctness, bits across batches, time beside XLA.

Run from the repository root: ``PYTHONPATH=. python scripts/bench/gpu_matmul.py``. Less or more:
``--specs o down``, ``--rows 1 64``, ``--no-xla``, ``--extra '{"consumers": 2, "splits": 4}'``.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench.ceilings import read_bytes_per_second
from pallas_kernels.bench.timing import median_seconds
from pallas_kernels.matmul.reference import gated_matmul_reference, skinny_matmul_reference
from pallas_kernels.matmul.skinny_config import (
    SkinnyConfig,
    default_skinny_config,
    refuses_skinny_sm90,
)
from pallas_kernels.matmul.skinny_sm90 import skinny_matmul_sm90
from pallas_kernels.matmul.specs import SPEED, SkinnySpec
from pallas_kernels.matmul.xla import gated_matmul_xla, skinny_matmul_xla

RUNS = 10
COMPILERS = 14  # programs compiled at once
COLD_BYTES = 400 << 20  # of distinct weights in a chain: far more than L2 holds
CALLS = 16
TIMED_ROWS, BITS_ROWS = (1, 8, 64), (2, 9)
# Launches follow each other on one stream: in a command buffer independent ones could overlap.
SERIAL = {"xla_gpu_enable_command_buffer": ""}
CUBLAS = SERIAL | {"xla_gpu_enable_triton_gemm": False, "xla_gpu_enable_cublaslt": True}
XLA = {"xla": SERIAL, "xla_cublaslt": CUBLAS}

_FULL: dict[str, Any] = {"consumers": 4, "block_k": 64}
_PAIRED: dict[str, Any] = {"consumers": 2, "tiles": 2}
_NARROW: tuple[dict[str, Any], ...] = (
    {"consumers": 2, "splits": 4},
    {"consumers": 2, "splits": 4, "block_k": 64},
    {"consumers": 2, "splits": 8, "block_k": 64, "ctas_per_sm": 2},
    {"consumers": 4, "splits": 8, "block_k": 64},
    {"consumers": 1, "splits": 2},
    {"consumers": 1, "splits": 4, "block_k": 64, "ctas_per_sm": 2},
)
GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "gate_up": (
        _FULL,
        {**_PAIRED, "block_k": 64},
        {"consumers": 2},
        {"consumers": 2, "block_k": 64, "ctas_per_sm": 2, "num_ctas": 264},
        {"consumers": 2, "splits": 4},
        {"consumers": 2, "splits": 2, "block_k": 64, "ctas_per_sm": 2},
    ),
    "gated": (
        {**_PAIRED, "block_k": 64},
        {**_PAIRED, "block_k": 128},
        {"consumers": 1, "tiles": 2},
        {"consumers": 1, "tiles": 2, "block_k": 64, "ctas_per_sm": 2, "num_ctas": 264},
    ),
    "down": _NARROW,
    "o": _NARROW,
    "qkv": (
        {"consumers": 2, "splits": 2},
        {"consumers": 3, "splits": 4, "block_k": 64},
        {"consumers": 2, "splits": 4, "block_k": 64, "ctas_per_sm": 2},
        {"consumers": 1},
        {"consumers": 1, "splits": 2, "block_k": 64, "ctas_per_sm": 2},
        {"consumers": 1, "splits": 4, "block_k": 64, "ctas_per_sm": 3},
    ),
    "lm_head": (
        _FULL,
        {**_PAIRED, "block_k": 64},
        {"consumers": 2},
        {"consumers": 2, "block_k": 64, "ctas_per_sm": 2, "num_ctas": 264},
    ),
}

Product = Callable[[jax.Array, jax.Array], jax.Array]
Programs = dict[tuple[SkinnySpec, int, str], Callable[[], Any]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--specs", nargs="*", default=[spec.name for spec in SPEED])
    parser.add_argument("--rows", nargs="*", type=int, default=list(TIMED_ROWS))
    parser.add_argument("--extra", type=json.loads, action="append", default=[])
    parser.add_argument("--only-extra", action="store_true")
    parser.add_argument("--prefetch", action="store_true", help="each config with it, too")
    parser.add_argument("--no-xla", action="store_true")
    return parser.parse_args()


def out_dtype(spec: SkinnySpec) -> Any:
    return jnp.float32 if spec.wide else jnp.bfloat16


def kernel(spec: SkinnySpec, config: SkinnyConfig) -> Product:
    return partial(skinny_matmul_sm90, gated=spec.gated, out_dtype=out_dtype(spec), config=config)


def plain(spec: SkinnySpec) -> Product:
    return gated_matmul_xla if spec.gated else partial(skinny_matmul_xla, out_dtype=out_dtype(spec))


def chain(product: Product) -> Callable[[jax.Array, list[jax.Array]], list[jax.Array]]:
    """Calls one after the other, each with another weight."""

    def run(x: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
        results = []
        for call in range(CALLS if len(weights) > 1 else 4):
            y = product(x, weights[call % len(weights)])
            x, y = lax.optimization_barrier((x, y))
            results.append(y)
        return results

    return run


def calls(weights: list[jax.Array]) -> int:
    return CALLS if len(weights) > 1 else 4


class Data:
    """Weights and rows of every spec; a smaller batch is the beginning of a larger one."""

    def __init__(self, specs: list[SkinnySpec]):
        self._weights: dict[tuple[int, int], list[jax.Array]] = {}
        self.x: dict[int, jax.Array] = {}
        for spec in specs:
            if spec[1:3] in self._weights:
                continue
            count = math.ceil(COLD_BYTES / (spec.n * spec.k * 2))
            keys = jax.random.split(jax.random.key(spec.n), count)
            draw = jax.jit(partial(_normal, (spec.n, spec.k), spec.k**-0.5))
            self._weights[spec[1:3]] = [draw(key) for key in keys]
            self.x[spec.k] = _normal((64, spec.k), 1.0, jax.random.key(spec.k))

    def weights(self, spec: SkinnySpec) -> list[jax.Array]:
        return self._weights[spec[1:3]]

    def want(self, spec: SkinnySpec) -> jax.Array:
        reference = gated_matmul_reference if spec.gated else skinny_matmul_reference
        return jax.jit(reference)(self.x[spec.k], self.weights(spec)[0])


def _normal(shape: tuple[int, ...], scale: float, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)


def configs(spec: SkinnySpec, args: argparse.Namespace) -> dict[str, SkinnyConfig]:
    """The default's fields are in the grid too: it is marked, not measured twice."""
    default = default_skinny_config(spec.n, spec.k, gated=spec.gated)
    grid = [] if args.only_extra else [default]
    grid += [SkinnyConfig(**fields) for fields in (() if args.only_extra else GRIDS[spec.name])]
    grid += [SkinnyConfig(**fields) for fields in args.extra]
    if args.prefetch:
        grid += [replace(config, prefetch=True) for config in grid]
    found = {}
    for config in dict.fromkeys(grid):
        mark = "*" if config == default else ""
        found[_name(config) + mark] = config
    return found


def _name(config: SkinnyConfig) -> str:
    tiles = f"{config.consumers}x{config.tiles}"
    sizes = f"{tiles} s{config.splits} k{config.block_k} c{config.ctas_per_sm} g{config.num_ctas}"
    return sizes + (" pdl" if config.prefetch else "")


def programs(specs: list[SkinnySpec], data: Data, args: argparse.Namespace) -> Programs:
    found: Programs = {}
    for spec in specs:
        for rows in args.rows:
            x, weights = data.x[spec.k][:rows], data.weights(spec)
            for name, config in configs(spec, args).items():
                dtypes = (x.dtype, out_dtype(spec))
                shape = (rows, spec.n, spec.k, *dtypes)
                if reason := refuses_skinny_sm90(*shape, "sm_90", config, gated=spec.gated):
                    print(spec.name, name, "refused:", reason)
                    continue
                program = jax.jit(chain(kernel(spec, config)), compiler_options=SERIAL)
                found[spec, rows, name] = partial(program, x, weights)
            for name, options in {} if args.no_xla else XLA.items():
                program = jax.jit(chain(plain(spec)), compiler_options=options)
                found[spec, rows, name] = partial(program, x, weights)
    return found


def verdict(result: jax.Array, want: jax.Array) -> tuple[bool, float]:
    """The largest error, beside what one rounding of the result and two of gate and up explain."""
    want = want[: result.shape[0]]
    error = jnp.abs(result.astype(jnp.float32) - want)
    relative = float((error / jnp.maximum(jnp.abs(want), 1.0)).max())
    return relative < (1e-3 if result.dtype == jnp.float32 else 2**-6), relative


def check_bits(spec: SkinnySpec, data: Data) -> str:
    config = default_skinny_config(spec.n, spec.k, gated=spec.gated)
    product, x, w = kernel(spec, config), data.x[spec.k], data.weights(spec)[0]
    whole = product(x, w)
    good, error = verdict(whole, data.want(spec))
    equal = {rows: bool((product(x[:rows], w) == whole[:rows]).all()) for rows in BITS_ROWS}
    alone = bool((product(x[5:6], w) == whole[5:6]).all())
    return f"{'right' if good else 'WRONG'} ({error:.1e}); rows equal {equal}, row alone {alone}"


def main() -> None:
    args, begin = arguments(), time.perf_counter()
    specs = [spec for spec in SPEED if spec.name in args.specs]
    print(jax.__version__, jax.devices()[0].device_kind)
    ceiling = read_bytes_per_second()
    report: dict[str, Any] = {"device": jax.devices()[0].device_kind, "us": {}, "check": {}}
    report["read_tb_per_s"] = ceiling / 1e12
    print(f"read {ceiling / 1e12:.2f} TB/s")
    data = Data(specs)
    wants = {spec: data.want(spec) for spec in specs}
    timed = programs(specs, data, args)
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = {key: pool.submit(_first, program) for key, program in timed.items()}
        for spec in specs:
            report["check"][spec.name] = _attempt(check_bits, spec, data)
            print(spec.name, report["check"][spec.name], flush=True)
    print(f"compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    longest: dict[tuple[SkinnySpec, str], jax.Array] = {}
    for key in sorted(timed, key=lambda key: (specs.index(key[0]), key[1])):
        line = _measure(key, timed[key], compiled[key], data, wants, longest, report)
        print(line, flush=True)
    print(f"done after {time.perf_counter() - begin:.0f} s")
    if out := os.environ.get("OUT"):
        Path(out, "gpu_matmul.json").write_text(json.dumps(report, indent=1))


def _first(program: Callable[[], Any]) -> jax.Array:
    return jax.block_until_ready(program())[0]


def _measure(
    key: tuple[SkinnySpec, int, str],
    program: Callable[[], Any],
    compiled: Future[jax.Array],
    data: Data,
    wants: dict[SkinnySpec, jax.Array],
    shorter: dict[tuple[SkinnySpec, str], jax.Array],
    report: dict[str, Any],
) -> str:
    """Also compares the bits with those of the next smaller batch, which is timed before."""
    spec, rows, name = key
    label = f"{spec.name:8s} M={rows:<3d} {name:24s}"
    if error := compiled.exception():
        return f"{label} FAILED {type(error).__name__}: {str(error)[:400]}"
    result = compiled.result()
    good, error = verdict(result, wants[spec])
    before = shorter.get((spec, name))
    same = before is None or bool((result[: before.shape[0]] == before).all())
    shorter[spec, name] = result
    count = calls(data.weights(spec))
    elapsed = median_seconds(program, calls=count, queued=3, runs=RUNS)
    rate = spec.n * spec.k * 2 / elapsed
    report["us"].setdefault(spec.name, {}).setdefault(str(rows), {})[name] = round(elapsed * 1e6, 2)
    notes = ("" if good else f" WRONG {error:.1e}") + ("" if same else " BITS CHANGE WITH M")
    return f"{label} {elapsed * 1e6:7.2f} us {rate / 1e12:5.2f} TB/s{notes}"


def _attempt(function: Any, *args: Any) -> str:
    try:
        return function(*args)
    except Exception as error:  # whatever a compiler raises: one failure must not hide the rest
        return f"FAILED {type(error).__name__}: {str(error)[:600]}"


if __name__ == "__main__":
    main()
