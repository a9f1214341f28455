"""Multi-head latent attention (DeepSeek-V2, V3) by the kernels: whether it is right, and its speed
beside plain attention that reads about as many bytes, or multiplies about as much.

Programs compile side by side. What is found is printed at once, because the whole may end too late.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.env import prepare_accelerator
from pallas_kernels.attention import decode_specs, prefill_specs
from pallas_kernels.attention.api import paged_decode
from pallas_kernels.attention.decode_problem import make_decode_problem
from pallas_kernels.attention.decode_problem import right_answer as right_decode
from pallas_kernels.attention.latent_prefill_sm90 import (
    make_latent_tiles,
    paged_latent_prefill_sm90,
)
from pallas_kernels.attention.prefill_problem import make_prefill_problem
from pallas_kernels.attention.prefill_problem import right_answer as right_prefill
from pallas_kernels.bench.ceilings import measure_ceilings
from pallas_kernels.bench.decode import DecodeOperation
from pallas_kernels.bench.operation import Operation, Timed
from pallas_kernels.bench.prefill import PrefillOperation
from pallas_kernels.bench.suite import target_platform
from scripts.bench.h200.part import Part, main

_THREADS = 8
_CALLS = 10  # that must have the same bits
Figures = dict[str, Any]


def measure(part: Part) -> Figures:
    prepare_accelerator(0.85)
    ceilings = measure_ceilings()
    decode, prefill = DecodeOperation(), PrefillOperation()
    shapes = decode_specs.SPEED_LATENTS, prefill_specs.SPEED_LATENTS
    plain = decode_specs.SPEED[:4], prefill_specs.SPEED[:4]
    checked = decode_specs.MIXED, prefill_specs.LATENT_MIXED
    if part.tiny:
        shapes = decode_specs.SMALL[-1:], prefill_specs.LATENT_SMALL[1:]
        plain = decode_specs.SMALL[:1], prefill_specs.SMALL[:1]
        checked = decode_specs.SMALL, prefill_specs.LATENT_SMALL
    return {
        "decode_errors": each(decode_error, [s for s in checked[0] if s.value_dim]),
        "prefill_errors": each(prefill_error, checked[1]),
        "decode": beside(decode, shapes[0], plain[0], ceilings.read_bytes_per_second),
        "prefill": beside(prefill, shapes[1], plain[1], ceilings.matmul_flops_per_second),
    }


def each(function: Callable[[Any], Any], specs: Sequence[Any]) -> Figures:
    """Of each shape, by name, found side by side."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            spec.name: one
            for spec, one in zip(specs, pool.map(tried(function), specs), strict=True)
        }


def tried(function: Callable[..., Any]) -> Callable[..., Any]:
    """One that fails must not hide the others."""

    def found(spec: Any) -> Any:
        try:
            figure = function(spec)
        except Exception as error:
            figure = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        shown = "ready" if isinstance(figure, Timed) else figure
        print(f"{function.__name__}, {spec.name}: {shown}", flush=True)
        return figure

    return found


def _worst(got: jax.Array, want: jax.Array) -> float:
    """Largest error over the largest right number."""
    error = np.abs(np.asarray(got, np.float32) - np.asarray(want))
    return float(error.max() / np.abs(np.asarray(want)).max())


def right(answer: Any, spec: Any, problem: Any, scale: float) -> jax.Array:
    """Without trying which of many ways is the fastest for each of its products."""
    lowered = answer.lower(spec, problem, scale)
    return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})(problem)


def decode_error(spec: decode_specs.DecodeSpec) -> Figures:
    """And whether a row alone has the bits that it has among others, and they every time."""
    q, kv, tables, lens = problem = make_decode_problem(spec)
    scale = spec.dim**-0.5
    facts: Any = {"scale": scale, "platform": target_platform(), "window": spec.window}
    attend = jax.jit(partial(paged_decode, value_dim=spec.value_dim, **facts))
    row = int(np.argmax(spec.lens))
    one = slice(row, row + 1)
    got, alone = attend(q, kv, tables, lens), attend(q[one], kv, tables[one], lens[one])
    return {
        "error": _worst(got, right(right_decode, spec, problem, scale)),
        "same_bits_alone": bool((alone[0] == got[row]).all()),
        "repeatable": all(bool((attend(q, kv, tables, lens) == got).all()) for _ in range(_CALLS)),
    }


def prefill_error(spec: prefill_specs.PrefillSpec) -> Figures:
    if target_platform() != "sm_90":
        return {"error": None}
    q, kv, tables, starts, lens, num_decode_rows = problem = make_prefill_problem(spec)
    scale = spec.dim**-0.5
    tiles = make_latent_tiles(starts, lens, num_decode_rows, spec.tokens, spec.heads)
    out = jnp.zeros((spec.tokens, spec.heads, spec.value_dim), q.dtype)

    def attend() -> jax.Array:
        return paged_latent_prefill_sm90(q, kv, tables, tiles, out, scale=scale)

    got = attend()
    return {
        "error": _worst(got, right(right_prefill, spec, problem, scale)),
        "repeatable": all(bool((attend() == got).all()) for _ in range(_CALLS)),
    }


def beside(
    operation: Operation[Any, Any], specs: Sequence[Any], plain: Sequence[Any], ceiling: float
) -> Figures:
    """Of each shape microseconds, the share of the ceiling, and its rate over that of the plain
    shape with the nearest amount to move or to compute."""

    def prepared(spec: Any) -> Timed:
        """By the form that serves here."""
        config = operation.default(spec)
        refused = operation.refuses(spec, config, target_platform())
        timed = operation.timed(spec, config if refused is None else None)
        jax.block_until_ready(timed.dispatch())
        return timed

    def rate(spec: Any) -> float:
        """Bytes or operations per second."""
        return operation.amount(spec) / made[spec.name].seconds(runs)

    made = each(prepared, (*specs, *plain))
    runs = 1 if jax.default_backend() == "cpu" else 20
    ready = [spec for spec in (*specs, *plain) if isinstance(made[spec.name], Timed)]
    rates = {spec.name: tried(rate)(spec) for spec in ready}
    report: Figures = {"plain": {s.name: rates.get(s.name, made[s.name]) for s in plain}}
    for spec in specs:
        own, amount = rates.get(spec.name, made[spec.name]), operation.amount(spec)
        near = min(plain, key=lambda p: abs(math.log(operation.amount(p) / amount)))
        of_near = rates.get(near.name)
        if isinstance(own, float) and isinstance(of_near, float):
            own = {
                "us": amount / own * 1e6,
                "rate": own,
                "of_ceiling": own / ceiling,
                "of_plain": own / of_near,
                "plain": near.name,
            }
        report[spec.name] = own
    return report


if __name__ == "__main__":
    main(measure)
