"""Truncated sampling in plain XLA: the threshold search against sorting, and what it leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.sampling.api import sample
from pallas_kernels.sampling.noise import gumbel, row_keys
from pallas_kernels.sampling.xla import first_largest, sample_xla, thresholds_xla

ONE = jnp.ones((1,), jnp.float32)


@functools.partial(jax.jit, static_argnames=("bits", "skip"))
def kept(
    x: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    bits: int = 1,
    skip: bool = True,
) -> jax.Array:
    threshold = thresholds_xla(x, temperature, top_k, top_p, min_p, bits=bits, skip=skip)
    return x >= threshold[:, None]


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
    skip=st.booleans(),
)
def test_equals_sorting(seed: int, top_k: int, top_p: float, min_p: float, skip: bool) -> None:
    """Without branches (``skip``) several bits a pass, as on a GPU."""
    x = np.random.default_rng(seed).normal(scale=3.0, size=(2, 97)).astype(np.float32)
    got = kept(
        jnp.asarray(x),
        jnp.ones((2,), jnp.float32),
        jnp.asarray([top_k, 3], jnp.int32),
        jnp.asarray([top_p, 0.7], jnp.float32),
        jnp.asarray([min_p, 0.0], jnp.float32),
        bits=1 if skip else 4,
        skip=skip,
    )
    np.testing.assert_array_equal(got[0], by_sorting(x[0], top_k, top_p, min_p))
    np.testing.assert_array_equal(got[1], by_sorting(x[1], 3, 0.7, 0.0))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ties_at_the_threshold_are_all_kept(top_k: int) -> None:
    x = jnp.asarray([[0.0, -0.0, 5.0, 5.0, 5.0, -3.0]], jnp.float32)
    got = kept(x, ONE, jnp.asarray([top_k], jnp.int32), ONE, 0 * ONE)
    assert got[0].tolist() == [False, False, True, True, True, False]


def test_rows_that_ask_for_nothing_get_the_same_bits_beside_any_other() -> None:
    """The CPU's form searches, and makes noise, only if some row asks."""
    rows, vocab = 4, 1000
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(rows, vocab)), jnp.float32)
    seed = jnp.asarray(rng.integers(-(2**31), 2**31, (rows, 2)), jnp.int32)
    position = jnp.arange(rows, dtype=jnp.int32)
    temperature = jnp.asarray([0.0, 1.0, 0.7, 1.3], jnp.float32)
    top_k = jnp.asarray([0, 0, 40, 0], jnp.int32)
    top_p, min_p = jnp.asarray([1.0, 1.0, 1.0, 0.8]), jnp.zeros((rows,), jnp.float32)
    args = (logits, temperature, top_k, top_p, min_p, seed, position)
    on_cpu = jax.jit(functools.partial(sample, platform="cpu"))
    together = on_cpu(*args)
    for row in range(rows):
        alone = on_cpu(*(part[row : row + 1] for part in args))
        assert alone[0] == together[row]
    np.testing.assert_array_equal(jax.jit(sample_xla)(*args), together)


def test_the_first_of_equals_is_the_largest() -> None:
    x = jnp.asarray([[1.0, 7.0, 7.0], [-jnp.inf] * 3, [jnp.nan, 1.0, 2.0], [3.0, 2.0, 1.0]])
    got = first_largest(x).tolist()
    assert got[:2] == [1, 0] and 0 <= got[2] < 3 and got[3] == 0


def test_noise_is_that_of_jax() -> None:
    """Bit for bit, so that the oracle can be as short as it is."""
    seed = jnp.asarray([[1, 2], [3, -4]], jnp.int32)
    position = jnp.asarray([5, 600], jnp.int32)
    keys = row_keys(seed, position)
    token = jnp.broadcast_to(jnp.arange(1000, dtype=jnp.uint32)[None], (2, 1000))
    got = gumbel(keys[:, :1], keys[:, 1:], token)
    for row in range(2):
        key = jax.random.wrap_key_data(seed[row].astype(jnp.uint32), impl="threefry2x32")
        want = jax.random.gumbel(jax.random.fold_in(key, position[row]), (1000,), jnp.float32)
        np.testing.assert_array_equal(got[row], want)
