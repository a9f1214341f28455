"""Truncated sampling, to be timed and tuned: bytes of one read of the logits per second."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.bench.operation import XLA_CALLS, Operation, Timed
from pallas_kernels.sampling.reference import sample_reference
from pallas_kernels.sampling.sample_config import SampleConfig, Truncation
from pallas_kernels.sampling.sample_sm90 import refuses_sample_sm90, sample_sm90
from pallas_kernels.sampling.specs import SMALL, SPEED, SampleSpec
from pallas_kernels.sampling.xla import sample_xla

BUFFERS = 4  # batches of one chain: with 64 rows 131 MB, more than the L2 cache holds
QUEUED = 20  # dispatches under way
SPREAD = 4.0  # standard deviation of the logits; a nucleus of some dozens
MODE = (0.8, 50, 0.9, 0.0)  # temperature, top_k, top_p, min_p
_CHECKED = SampleSpec(64, 128256)

SampleCall = Callable[[jax.Array, Truncation, jax.Array, jax.Array], jax.Array]


class SamplingOperation(Operation[SampleSpec, SampleConfig]):
    name, unit, speed, small = "sampling", "byte", SPEED, SMALL

    def label(self, spec: SampleSpec) -> str:
        return f"{spec.rows} x {spec.vocab}"

    def amount(self, spec: SampleSpec) -> int:
        return spec.rows * spec.vocab * 4

    def default(self, spec: SampleSpec) -> SampleConfig:
        return SampleConfig()

    def grid(self, default: SampleConfig, num_sms: int) -> Sequence[dict[str, Any]]:
        tried = [(default.splits, default.unroll), (8, 4), (8, 8), (16, 4), (4, 8), (8, 2), (16, 2)]
        return [{"splits": splits, "unroll": unroll} for splits, unroll in dict.fromkeys(tried)]

    def refuses(self, spec: SampleSpec, config: SampleConfig, platform: str) -> str | None:
        return refuses_sample_sm90(spec.vocab, platform)

    def timed(self, spec: SampleSpec, config: SampleConfig | None) -> Timed:
        rest = truncation(spec.rows)
        if config is None:
            return sampling_chain(_op(config), spec, rest, calls=XLA_CALLS, queued=3)
        # The host dispatches no chain in less than 70 us, so few rows need a long one.
        calls = BUFFERS if spec.rows >= 64 else 4 * BUFFERS
        return sampling_chain(_op(config), spec, rest, calls=calls)

    def checker(self) -> Callable[[SampleConfig], str | None]:
        rest = truncation(_CHECKED.rows)
        logits, seed, position = sampling_inputs(_CHECKED, seed=7)
        want = jax.jit(sample_reference)(logits, *rest, seed, position)

        def wrong(config: SampleConfig) -> str | None:
            got = _op(config)(logits, rest, seed, position)
            differing = int((got != want).sum())
            # One, where the division by temperature makes two logits equal.
            return None if differing <= 1 else f"{differing} of {_CHECKED.rows} tokens differ"

        return wrong


def truncation(rows: int, mode: tuple[float, int, float, float] = MODE) -> Truncation:
    temperature, top_k, top_p, min_p = mode
    return Truncation(
        jnp.full((rows,), temperature, jnp.float32),
        jnp.full((rows,), top_k, jnp.int32),
        jnp.full((rows,), top_p, jnp.float32),
        jnp.full((rows,), min_p, jnp.float32),
    )


def sampling_inputs(
    spec: SampleSpec, spread: float = SPREAD, *, seed: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, seeds and positions."""
    logits = spread * jax.random.normal(jax.random.key(seed), spec, jnp.float32)
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (spec.rows, 2))
    positions = jnp.arange(spec.rows, dtype=jnp.int32) + 1000
    return logits, jnp.asarray(words, jnp.int32), positions


def sampling_chain(
    op: SampleCall,
    spec: SampleSpec,
    rest: Truncation,
    spread: float = SPREAD,
    *,
    calls: int = BUFFERS,
    queued: int = QUEUED,
) -> Timed:
    """Each call waits for the one before."""
    batches = [sampling_inputs(spec, spread, seed=seed) for seed in range(BUFFERS)]

    def run(batches: Any, rest: Truncation) -> jax.Array:
        token = jnp.zeros((spec.rows,), jnp.int32)
        for i in range(calls):
            one = batches[i % BUFFERS]
            (logits, seed, position), rest, token = lax.optimization_barrier((one, rest, token))
            token = op(logits, rest, seed, position)
        return token

    program = jax.jit(run)
    return Timed(lambda: program(batches, rest), calls, queued)


def _op(config: SampleConfig | None) -> SampleCall:
    if config is None:
        return lambda logits, rest, seed, position: sample_xla(logits, *rest, seed, position)
    return lambda *args: sample_sm90(*args, config=config)
