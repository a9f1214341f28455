"""Truncated sampling: kernels (interpreted) and XLA form against the sorting oracle."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sampling.api import sample
from pallas_kernels.sampling.reference import sample_reference, thresholds_reference
from pallas_kernels.sampling.sample_sm90 import (
    SampleConfig,
    Truncation,
    refuses_sample_sm90,
    sample_sm90,
    thresholds_sm90,
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
WIDE = [  # more than the groups keep: what they cannot tell is searched in the row
    ((1.0, 4.0), (5004, 0), (1.0, 0.95), (0.0, 0.0)),
    ((2.0, 1.0), (4000, 3000), (0.99, 0.95), (0.0, 0.001)),
    ((9.0, 5.0), (0, 0), (0.97, 0.9), (0.5, 0.2)),
    ((9.0, 5.0), (3000, 9999), (0.5, 0.999), (0.3, 0.2)),
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
def _kernel_thresholds(logits: jax.Array, truncation: Truncation) -> jax.Array:
    return thresholds_sm90(logits, truncation, config=CONFIG, interpret=INTERPRET)


@jax.jit
def _reference(logits: jax.Array, truncation: Truncation) -> jax.Array:
    return sample_reference(logits, *truncation, SEED, POSITION)


@functools.partial(jax.jit, static_argnames="bits")
def _xla(logits: jax.Array, truncation: Truncation, bits: int) -> jax.Array:
    return sample_xla(logits, *truncation, SEED, POSITION, bits=bits)


def _kept_by_reference(logits: jax.Array, truncation: Truncation) -> np.ndarray:
    scaled = logits / truncation.temperature[:, None]
    kept = scaled >= thresholds_reference(scaled, *truncation[1:])[:, None]
    return np.asarray(kept & (logits > -jnp.inf))


@pytest.mark.parametrize("case", [*CASES, WIDE[1]], ids=str)
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
    got = jax.jit(functools.partial(sample, platform="cpu"))(logits, *truncation, SEED, POSITION)
    np.testing.assert_array_equal(got, _reference(logits, truncation))


@pytest.mark.parametrize("case", [case for case in CASES if 0.0 not in case[0]], ids=str)
def test_thresholds_keep_the_same_tokens(case: Any) -> None:
    """Whole numbers, so that many tie with the threshold; the kept sets must be equal."""
    truncation = _truncation(case)
    logits = jnp.round(_logits(2) * 2)
    want = _kept_by_reference(logits, truncation)
    np.testing.assert_array_equal(logits >= thresholds_xla(logits, *truncation)[:, None], want)
    got = logits >= _kernel_thresholds(logits, truncation)[:, None]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_thresholds_that_the_groups_cannot_tell(case: Any) -> None:
    truncation, logits = _truncation(case), _logits(6)
    want = _kept_by_reference(logits, truncation)
    assert want.sum(axis=1).max() > 800
    got = logits >= _kernel_thresholds(logits, truncation)[:, None]
    np.testing.assert_array_equal(got, want)


def test_a_group_that_holds_more_of_the_largest_than_it_keeps() -> None:
    """Six of row 0's largest logits share a group, which keeps four."""
    truncation = _truncation(((1.0, 1.0), (6, 6), (1.0, 1.0), (0.0, 0.0)))
    logits = _logits(3).at[0, : 6 * 1024 : 512].set(jnp.arange(50.0, 60.0))
    got = logits >= _kernel_thresholds(logits, truncation)[:, None]
    np.testing.assert_array_equal(got, _kept_by_reference(logits, truncation))


def test_a_row_that_keeps_everything_is_not_read_for_that() -> None:
    """And what was banned stays out: the threshold is the least finite number."""
    logits = _logits(4).at[1].set(jnp.nan)
    truncation = _truncation(((1.0, 1.0), (0, VOCAB), (1.0, 1.0), (0.0, 0.0)))
    assert _kernel_thresholds(logits, truncation).tolist() == [np.finfo(np.float32).min] * 2


def test_a_row_of_nothing_gives_a_valid_token() -> None:
    logits = _logits(5).at[0].set(-jnp.inf).at[1].set(jnp.nan)
    tokens = _kernel(logits, _truncation(((1.0, 1.0), (50, 50), (0.9, 0.9), (0.1, 0.1))))
    assert all(0 <= token < VOCAB for token in tokens.tolist())


@pytest.mark.parametrize("case", [CASES[2], WIDE[1]], ids=str)
def test_a_row_does_not_depend_on_the_batch(case: Any) -> None:
    """Row 1's groups cannot tell in the second case, and it is searched beside row 0."""
    logits, truncation = _logits(4), _truncation(case)
    together = _kernel(logits, truncation)
    for row in range(ROWS):
        part = slice(row, row + 1)
        alone = Truncation(*(leaf[part] for leaf in truncation))
        args = (logits[part], alone, SEED[part], POSITION[part])
        got = sample_sm90(*args, config=CONFIG, interpret=INTERPRET)
        assert got[0] == together[row]


@pytest.mark.parametrize("case", [CASES[1], WIDE[2]], ids=str)
def test_kernels_have_no_race(case: Any) -> None:
    alone = Truncation(*(leaf[:1] for leaf in _truncation(case)))
    logits = _logits(5, 1)
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
    logits = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
    floats, ints = (jax.ShapeDtypeStruct((rows,), d) for d in (jnp.float32, jnp.int32))
    seed = jax.ShapeDtypeStruct((rows, 2), jnp.int32)
    truncation: Any = Truncation(floats, ints, floats, floats)  # pyright: ignore[reportArgumentType]
    traced = jax.jit(sample_sm90).trace(logits, truncation, seed, ints)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 3
    assert "stablehlo.case" not in text and "stablehlo.while" not in text


def test_refusals_name_the_shape() -> None:
    assert refuses_sample_sm90(128256, "sm_90") is None
    assert "cpu" in (refuses_sample_sm90(128256, "cpu") or "")
    assert "50257" in (refuses_sample_sm90(50257, "sm_90") or "")
