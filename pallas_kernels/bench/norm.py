"""Residual add and RMS norm, to be timed and tuned: bytes read and written per second."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench.operation import Operation, Timed
from pallas_kernels.norm.add_rms_norm_sm90 import (
    NormConfig,
    add_rms_norm_sm90,
    default_norm_config,
    refuses_add_rms_norm_sm90,
)
from pallas_kernels.norm.reference import add_rms_norm_reference
from pallas_kernels.norm.specs import SMALL, SPEED, WIDTHS, NormSpec
from pallas_kernels.norm.xla import add_rms_norm_xla

EPS = 1e-5

NormCall = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class NormOperation(Operation[NormSpec, NormConfig]):
    name, unit, speed, small = "norm", "byte", SPEED, SMALL

    def label(self, spec: NormSpec) -> str:
        return f"{spec.tokens} x {spec.width}"

    def amount(self, spec: NormSpec) -> int:
        return 2 * (4 * spec.tokens * spec.width + spec.width)

    def default(self, spec: NormSpec) -> NormConfig:
        return default_norm_config(*spec)

    def grid(self, default: NormConfig, num_sms: int) -> Sequence[dict[str, Any]]:
        return [{"rows": rows} for rows in dict.fromkeys((default.rows, 1, 2, 4))]

    def refuses(self, spec: NormSpec, config: NormConfig, platform: str) -> str | None:
        return refuses_add_rms_norm_sm90(spec.width, "bfloat16", platform)

    def timed(self, spec: NormSpec, config: NormConfig | None) -> Timed:
        calls = 2 if jax.default_backend() == "cpu" else 64
        return Timed(norm_chain(norm_call(config), spec, calls), calls)

    def checker(self) -> Callable[[NormConfig], str | None]:
        def wrong(config: NormConfig) -> str | None:
            specs = (NormSpec(64, width) for width in WIDTHS)
            found = (norm_error(norm_call(config), spec) for spec in specs)
            return next((error for error in found if error), None)

        return wrong


def norm_call(config: NormConfig | None) -> NormCall:
    """The kernel with ``config``; plain XLA with None."""
    if config is None:
        return partial(add_rms_norm_xla, eps=EPS)
    return partial(add_rms_norm_sm90, eps=EPS, config=config)


def norm_inputs(spec: NormSpec, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The residual stream, a branch and a weight."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x, branch = (jax.random.normal(key, spec, jnp.bfloat16) for key in keys[:2])
    weight = 1 + 0.1 * jax.random.normal(keys[2], (spec.width,), jnp.bfloat16)
    return x, branch, weight


def norm_error(op: NormCall, spec: NormSpec) -> str | None:
    """What is wrong with ``op``: the sum must have the right bits, the norm three roundings."""
    x, branch, weight = norm_inputs(spec)
    normed, total = op(x, branch, weight)
    if (total != x + branch).any():
        return f"{spec}: the sum is wrong"
    want, _ = add_rms_norm_reference(x, branch, weight, eps=EPS)
    error = jnp.abs(normed.astype(jnp.float32) - want) / jnp.maximum(jnp.abs(want), 1e-3)
    return None if error.max() < 2**-6 else f"{spec}: the norm is {error.max():.1e} off"


def norm_chain(op: NormCall, spec: NormSpec, calls: int) -> Callable[[], jax.Array]:
    """Calls one after the other, each adding the norm that the one before made to its sum."""
    inputs = norm_inputs(spec)

    def run(x: jax.Array, branch: jax.Array, weight: jax.Array) -> jax.Array:
        for _ in range(calls):
            branch, x = op(x, branch, weight)
            branch, x = lax.optimization_barrier((branch, x))  # where a model multiplies matrices
        return branch

    program = jax.jit(run)
    return lambda: program(*inputs)
