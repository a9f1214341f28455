"""Truncated sampling: kernels (interpreted) and XLA form against the sorting oracle."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxllm.sampling.rng import gumbel_noise
from jaxllm.sampling.truncation import truncate
from pallas_kernels.sampling.api import sample
from pallas_kernels.sampling.noise import gumbel, row_keys
from pallas_kernels.sampling.reference import sample_reference, thresholds_reference
from pallas_kernels.sampling.sample_sm90 import (
    SampleConfig,
    Truncation,
    draw_sm90,
    refuses_sample_sm90,
    sample_sm90,
    search_sm90,
)
from pallas_kernels.sampling.specs import SPECS
from pallas_kernels.sampling.xla import sample_xla, thresholds_xla

ROWS, VOCAB = 2, 5004  # not a multiple of a tile: the last one is moved back
CONFIG = SampleConfig(splits=4, unroll=2)
INTERPRET = plgpu.InterpretGPUParams()
SEED = jnp.asarray([[1, 2], [3, -4]], jnp.int32)
POSITION = jnp.asarray([5, 600], jnp.int32)
CASES = [  # temperature, top_k, top_p, min_p; one value per row
    ((1.0, 1.0), (20, 300), (1.0, 1.0), (0.0, 0.0)),
    ((1.0, 0.7), (0, 0), (0.9, 0.5), (0.0, 0.0)),
    ((1.3, 0.0), (20, 20), (0.9, 0.9), (0.0, 0.0)),
    ((1.0, 0.5), (0, 40), (1.0, 0.8), (0.1, 0.02)),
    ((1.0, 0.8), (0, 1), (1.0, 0.3), (0.0, 0.5)),
]


def _logits(seed: int = 0, rows: int = ROWS, vocab: int = VOCAB) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(rows, vocab)) * 3, jnp.float32)


def _truncation(case: Any) -> Truncation:
    temperature, top_k, top_p, min_p = case
    return Truncation(
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(min_p, jnp.float32),
    )


@jax.jit
def _kernel(logits: jax.Array, truncation: Truncation) -> jax.Array:
    return sample_sm90(logits, truncation, SEED, POSITION, config=CONFIG, interpret=INTERPRET)


@jax.jit
def _reference(logits: jax.Array, truncation: Truncation) -> jax.Array:
    return sample_reference(logits, *truncation, SEED, POSITION)


@functools.partial(jax.jit, static_argnames="bits")
def _xla(logits: jax.Array, truncation: Truncation, bits: int) -> jax.Array:
    return sample_xla(logits, *truncation, SEED, POSITION, bits=bits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_draws_what_the_reference_draws(case: Any) -> None:
    """Row 0 has tokens that a mask has banned."""
    logits, truncation = _logits().at[0, ::3].set(-jnp.inf), _truncation(case)
    want = _reference(logits, truncation)
    np.testing.assert_array_equal(_kernel(logits, truncation), want)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bits", [1, 4])
def test_xla_form_draws_what_the_reference_draws(case: Any, bits: int) -> None:
    logits, truncation = _logits(1), _truncation(case)
    want = _reference(logits, truncation)
    np.testing.assert_array_equal(_xla(logits, truncation, bits), want)


def test_api_takes_xla_elsewhere() -> None:
    logits, truncation = _logits(1), _truncation(CASES[3])
    got = sample(logits, *truncation, SEED, POSITION, platform="cpu")
    np.testing.assert_array_equal(got, _reference(logits, truncation))


@pytest.mark.parametrize("case", [case for case in CASES if 0.0 not in case[0]], ids=str)
def test_thresholds_keep_the_same_tokens(case: Any) -> None:
    """Whole numbers, so that many tie with the threshold; the kept sets must be equal."""
    truncation = _truncation(case)
    logits = jnp.round(_logits(2) * 2)
    scaled = logits / truncation.temperature[:, None]
    want = np.asarray(scaled >= thresholds_reference(scaled, *truncation[1:])[:, None])
    for_engine = truncate(scaled, SimpleNamespace(**truncation._asdict()))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(for_engine > -jnp.inf, want)
    np.testing.assert_array_equal(logits >= thresholds_xla(logits, *truncation)[:, None], want)
    found, exact = search_sm90(logits, truncation, config=CONFIG, interpret=INTERPRET)
    for row in range(ROWS):
        if exact[row]:
            np.testing.assert_array_equal(logits[row] >= found[row], want[row])


def test_a_row_the_groups_cannot_tell_is_searched_whole() -> None:
    """Six of row 0's largest logits share a group, which keeps four."""
    truncation = _truncation(((1.0, 1.0), (6, 6), (1.0, 1.0), (0.0, 0.0)))
    logits = _logits(3).at[0, : 6 * 1024 : 512].set(jnp.arange(50.0, 60.0))
    exact = search_sm90(logits, truncation, config=CONFIG, interpret=INTERPRET)[1]
    assert exact.tolist() == [False, True]
    want = _reference(logits, truncation)
    np.testing.assert_array_equal(_kernel(logits, truncation), want)


def test_a_row_does_not_depend_on_the_batch() -> None:
    truncation = _truncation(CASES[2])
    logits = _logits(4)
    both = search_sm90(
        logits, truncation._replace(temperature=jnp.ones(2)), config=CONFIG, interpret=INTERPRET
    )
    for row in range(ROWS):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], truncation)
        single = search_sm90(
            logits[row : row + 1],
            alone._replace(temperature=jnp.ones(1)),
            config=CONFIG,
            interpret=INTERPRET,
        )
        assert single[0][0] == both[0][row] and single[1][0] == both[1][row]


def test_noise_is_that_of_the_engine() -> None:
    keys = row_keys(SEED, POSITION)
    token = jnp.broadcast_to(jnp.arange(1000, dtype=jnp.uint32)[None], (2, 1000))
    got = gumbel(keys[:, :1], keys[:, 1:], token)
    np.testing.assert_array_equal(got, gumbel_noise(SEED, POSITION, 1000))


def test_kernels_have_no_race() -> None:
    logits, truncation = _logits(5, 1), _truncation(CASES[1])
    alone = Truncation(*(leaf[:1] for leaf in truncation))
    got = sample_sm90(
        logits,
        alone,
        SEED[:1],
        POSITION[:1],
        config=CONFIG,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    want = sample_reference(logits, *alone, SEED[:1], POSITION[:1])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rows,vocab", sorted({(1, spec.vocab) for spec in SPECS}))
def test_every_vocabulary_lowers_for_cuda(rows: int, vocab: int) -> None:
    logits, config = jax.ShapeDtypeStruct((rows, vocab), jnp.float32), SampleConfig()
    floats, ints = (jax.ShapeDtypeStruct((rows,), d) for d in (jnp.float32, jnp.int32))
    keys = jax.ShapeDtypeStruct((rows, 2), jnp.uint32)

    def run(logits: Any, truncation: Any, noisy: Any, keys: Any) -> Any:
        found, _ = search_sm90(logits, truncation, config=config)
        return draw_sm90(logits, truncation.temperature, found, noisy, keys, config=config)

    truncation: Any = Truncation(floats, ints, floats, floats)  # pyright: ignore[reportArgumentType]
    traced = jax.jit(run).trace(logits, truncation, ints, keys)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 3


def test_refusals_name_the_shape() -> None:
    assert refuses_sample_sm90(128256, "sm_90") is None
    assert "cpu" in (refuses_sample_sm90(128256, "cpu") or "")
    assert "50257" in (refuses_sample_sm90(50257, "sm_90") or "")
