"""Threshold search against sorting."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.sampling.truncation import truncate
from tests.fakes.sampling_metadata import metadata


def by_sorting(x: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens stay, in float64."""
    logits = x.astype(np.float64)
    keep = logits >= logits.max() + (np.log(min_p) if min_p > 0 else -np.inf)
    if top_k > 0:
        survivors = np.sort(logits[keep])[::-1]
        keep &= logits >= survivors[min(top_k, len(survivors)) - 1]
    if top_p < 1:
        order = np.argsort(-np.where(keep, logits, -np.inf), kind="stable")
        weights = np.where(keep, np.exp(logits - logits.max()), 0.0)[order]
        before = np.cumsum(weights) - weights
        edge = logits[order][before < top_p * weights.sum()].min()
        keep &= logits >= edge
    return keep


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.sampled_from([0, 1, 2, 7, 96, 97, 1000]),
    top_p=st.sampled_from([0.05, 0.31, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
def test_equals_sorting(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    x = np.random.default_rng(seed).normal(scale=3.0, size=(2, 97)).astype(np.float32)
    md = metadata(
        2,
        top_k=np.array([top_k, 3], np.int32),
        top_p=np.array([top_p, 0.7], np.float32),
        min_p=np.array([min_p, 0.0], np.float32),
    )
    got = np.isfinite(np.asarray(truncate(jnp.asarray(x), md)))
    np.testing.assert_array_equal(got[0], by_sorting(x[0], top_k, top_p, min_p))
    np.testing.assert_array_equal(got[1], by_sorting(x[1], 3, 0.7, 0.0))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ties_at_the_threshold_are_all_kept(top_k: int) -> None:
    x = jnp.asarray([[0.0, -0.0, 5.0, 5.0, 5.0, -3.0]], jnp.float32)
    got = truncate(x, metadata(1, top_k=np.array([top_k], np.int32)))
    assert np.isfinite(np.asarray(got))[0].tolist() == [False, False, True, True, True, False]


def test_kept_logits_keep_their_bits() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 50)).astype(np.float32))
    got = np.asarray(truncate(x, metadata(1, top_k=np.array([9], np.int32))))
    kept = np.isfinite(got)
    np.testing.assert_array_equal(got[kept], np.asarray(x)[kept])
