"""The gated product, to be timed and tuned: operations per second."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bench.operation import Operation, Timed
from pallas_kernels.gated_matmul.gated_sm90 import (
    GatedConfig,
    gated_matmul_sm90,
    refuses_gated_sm90,
)
from pallas_kernels.gated_matmul.reference import gated_matmul_reference
from pallas_kernels.gated_matmul.specs import MODELS, SMALL, SPEED, GatedSpec
from pallas_kernels.gated_matmul.xla import gated_matmul_xla

GatedCall = Callable[[jax.Array, jax.Array], jax.Array]


class GatedOperation(Operation[GatedSpec, GatedConfig]):
    name, unit, speed, small = "gated_matmul", "flop", SPEED, SMALL

    def label(self, spec: GatedSpec) -> str:
        return f"{spec.tokens} x {spec.width} x 2 x {spec.inner}"

    def amount(self, spec: GatedSpec) -> int:
        return 4 * spec.tokens * spec.width * spec.inner

    def default(self, spec: GatedSpec) -> GatedConfig:
        return GatedConfig()

    def grid(self, default: GatedConfig, num_sms: int) -> Sequence[dict[str, Any]]:
        bands = dict.fromkeys((default.band, 8, 16, 32))
        return [{"band": band, "num_ctas": num_sms} for band in bands]

    def refuses(self, spec: GatedSpec, config: GatedConfig, platform: str) -> str | None:
        return refuses_gated_sm90(*spec, "bfloat16", "silu", platform, config)

    def timed(self, spec: GatedSpec, config: GatedConfig | None) -> Timed:
        calls = 2 if jax.default_backend() == "cpu" else 8
        return Timed(gated_chain(gated_call(config), spec, calls), calls)

    def checker(self) -> Callable[[GatedConfig], str | None]:
        def wrong(config: GatedConfig) -> str | None:
            found = (gated_error(gated_call(config), spec) for spec in MODELS)
            return next((error for error in found if error), None)

        return wrong


def gated_call(config: GatedConfig | None, **more: Any) -> GatedCall:
    """The kernel with ``config``; plain XLA with None."""
    if config is None:
        return partial(gated_matmul_xla, activation="silu")
    return partial(gated_matmul_sm90, activation="silu", config=config, **more)


def gated_inputs(spec: GatedSpec, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Tokens and a weight, so that products are of size one."""
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (spec.tokens, spec.width), jnp.bfloat16)
    weight = jax.random.normal(keys[1], (2 * spec.inner, spec.width), jnp.bfloat16)
    return x, weight * jnp.bfloat16(spec.width**-0.5)


def gated_error(op: GatedCall, spec: GatedSpec) -> str | None:
    """What is wrong with ``op``: one rounding of a float32 result is allowed."""
    x, weight = gated_inputs(spec)
    want = gated_matmul_reference(x, weight, activation="silu")
    error = jnp.abs(op(x, weight).astype(jnp.float32) - want).max() / jnp.abs(want).max()
    return None if error < 4e-3 else f"{spec}: {error:.1e} of the largest value off"


def gated_chain(op: GatedCall, spec: GatedSpec, calls: int) -> Callable[[], jax.Array]:
    """Calls one after the other, each with tokens of its own: equal calls would become one."""
    x, weight = gated_inputs(spec)
    tokens = [jnp.roll(x, call, axis=1) for call in range(calls)]

    def run(tokens: list[jax.Array], weight: jax.Array) -> list[jax.Array]:
        answers: list[jax.Array] = []
        for x in tokens:
            if answers:
                x, answers[-1] = lax.optimization_barrier((x, answers[-1]))
            answers.append(op(x, weight))
        return answers

    program = jax.jit(run)
    return lambda: program(tokens, weight)
