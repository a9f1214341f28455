"""Multi-head latent attention (DeepSeek-V2, V3) by the kernels: whether it is right, and its speed
beside plain attention that reads about as many bytes, or multiplies about as much.
"""

import math
from collections.abc import Callable, Sequence
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
from pallas_kernels.bench.operation import Operation
from pallas_kernels.bench.prefill import PrefillOperation
from pallas_kernels.bench.suite import target_platform
from scripts.bench.h200.part import Part, main

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
        "decode_errors": {s.name: tried(decode_error, s) for s in checked[0] if s.value_dim},
        "prefill_errors": {s.name: tried(prefill_error, s) for s in checked[1]},
        "decode": beside(decode, shapes[0], plain[0], ceilings.read_bytes_per_second),
        "prefill": beside(prefill, shapes[1], plain[1], ceilings.matmul_flops_per_second),
    }


def tried(function: Callable[..., Any], *given: Any) -> Any:
    """One that fails must not hide the others."""
    try:
        return function(*given)
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _worst(got: jax.Array, want: jax.Array) -> float:
    """Largest error over the largest right number."""
    error = np.abs(np.asarray(got, np.float32) - np.asarray(want))
    return float(error.max() / np.abs(np.asarray(want)).max())


def decode_error(spec: decode_specs.DecodeSpec) -> Figures:
    """And whether a row alone has the bits that it has among others."""
    q, kv, tables, lens = problem = make_decode_problem(spec)
    scale = spec.dim**-0.5
    facts: Any = {"scale": scale, "platform": target_platform(), "window": spec.window}
    attend = jax.jit(partial(paged_decode, value_dim=spec.value_dim, **facts))
    row = int(np.argmax(spec.lens))
    one = slice(row, row + 1)
    got, alone = attend(q, kv, tables, lens), attend(q[one], kv, tables[one], lens[one])
    return {
        "error": _worst(got, right_decode(spec, problem, scale)),
        "same_bits_alone": bool((alone[0] == got[row]).all()),
    }


def prefill_error(spec: prefill_specs.PrefillSpec) -> Figures:
    if target_platform() != "sm_90":
        return {"error": None}
    q, kv, tables, starts, lens, num_decode_rows = problem = make_prefill_problem(spec)
    scale = spec.dim**-0.5
    tiles = make_latent_tiles(starts, lens, num_decode_rows, spec.tokens, spec.heads)
    out = jnp.zeros((spec.tokens, spec.heads, spec.value_dim), q.dtype)
    got = paged_latent_prefill_sm90(q, kv, tables, tiles, out, scale=scale)
    again = paged_latent_prefill_sm90(q, kv, tables, tiles, out, scale=scale)
    return {
        "error": _worst(got, right_prefill(spec, problem, scale)),
        "repeatable": bool((got == again).all()),
    }


def beside(
    operation: Operation[Any, Any], specs: Sequence[Any], plain: Sequence[Any], ceiling: float
) -> Figures:
    """Of each shape microseconds, the share of the ceiling, and its rate over that of the plain
    shape with the nearest amount to move or to compute."""
    of_plain = {spec: tried(rate, operation, spec) for spec in plain}
    report: Figures = {"plain": {s.name: one for s, one in of_plain.items()}}
    for spec in specs:
        own, amount = tried(rate, operation, spec), operation.amount(spec)
        near = min(plain, key=lambda p: abs(math.log(operation.amount(p) / amount)))
        if isinstance(own, float) and isinstance(of_plain[near], float):
            own = {
                "us": amount / own * 1e6,
                "rate": own,
                "of_ceiling": own / ceiling,
                "of_plain": own / of_plain[near],
                "plain": near.name,
            }
        report[spec.name] = own
    return report


def rate(operation: Operation[Any, Any], spec: Any) -> float:
    """Bytes or operations per second of the form that serves here."""
    config = operation.default(spec)
    refused = operation.refuses(spec, config, target_platform())
    runs = 1 if jax.default_backend() == "cpu" else 20
    seconds = operation.timed(spec, config if refused is None else None).seconds(runs)
    return operation.amount(spec) / seconds


if __name__ == "__main__":
    main(measure)
