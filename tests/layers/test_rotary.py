"""Rotary positions against complex numbers in float64."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.model import RopeConfig
from jaxllm.layers.rotary import apply_rotary, inverse_frequencies, rotary_table

LLAMA3 = RopeConfig(
    theta=500000.0, dim=128, scaling="llama3", factor=8.0, original_max_position=8192
)


def rotated(x: np.ndarray, rope: RopeConfig, positions: list[int]) -> np.ndarray:
    table = rotary_table(rope, jnp.asarray(positions, jnp.int32))
    return np.asarray(apply_rotary(jnp.asarray(x), table, rope))


def by_complex_numbers(x: np.ndarray, rope: RopeConfig, positions: list[int]) -> np.ndarray:
    out, half = x.astype(np.float64), rope.dim // 2
    for channel in range(half):
        a, b = (2 * channel, 2 * channel + 1) if rope.interleaved else (channel, channel + half)
        angle = np.asarray(positions) / rope.theta ** (2 * channel / rope.dim)
        turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * angle)[:, None]
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 8, 16])
def test_pairs_turn_and_the_rest_stays(dim: int, interleaved: bool) -> None:
    rope = RopeConfig(theta=10000.0, dim=dim, interleaved=interleaved)
    x = np.random.default_rng(dim).normal(size=(4, 3, 16)).astype(np.float32)
    positions = [0, 1, 7, 500]
    got = rotated(x, rope, positions)
    np.testing.assert_allclose(got, by_complex_numbers(x, rope, positions), atol=1e-4)
    np.testing.assert_array_equal(got[..., dim:], x[..., dim:])
    np.testing.assert_array_equal(got[0], x[0])  # position 0 does not turn


def test_products_depend_on_the_distance_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = (np.repeat(rng.normal(size=(1, 1, 64)), 3, axis=0).astype(np.float32) for _ in "qk")
    rope = RopeConfig(theta=10000.0, dim=64)
    products = (rotated(q, rope, [5, 105, 1005]) * rotated(k, rope, [2, 102, 1002])).sum(axis=-1)
    np.testing.assert_allclose(products, products[0, 0], rtol=1e-3)


def test_the_result_has_the_dtype_of_the_input() -> None:
    rope = RopeConfig(theta=10000.0, dim=4)
    table = rotary_table(rope, jnp.arange(2))
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert apply_rotary(jnp.ones((2, 1, 8), dtype), table, rope).dtype == dtype


def test_linear_scaling_divides_positions() -> None:
    plain = RopeConfig(theta=10000.0, dim=8)
    linear = RopeConfig(theta=10000.0, dim=8, scaling="linear", factor=4.0)
    x = np.random.default_rng(1).normal(size=(2, 1, 8)).astype(np.float32)
    np.testing.assert_allclose(rotated(x, linear, [0, 400]), rotated(x, plain, [0, 100]), rtol=1e-5)


def test_llama3_keeps_short_waves_and_slows_long_ones() -> None:
    plain = inverse_frequencies(RopeConfig(theta=LLAMA3.theta, dim=LLAMA3.dim))
    scaled = inverse_frequencies(LLAMA3)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert short.sum() > 10 and long.sum() > 10 and (~short & ~long).sum() > 3
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert (np.diff(between) < 0).all() and ((between > 1 / 8) & (between < 1)).all()


def test_yarn_keeps_what_turns_often_and_slows_what_seldom_does() -> None:
    yarn = replace(LLAMA3, scaling="yarn", factor=16.0, original_max_position=4096, amplitude=1.2)
    plain, scaled = inverse_frequencies(replace(yarn, scaling="none")), inverse_frequencies(yarn)
    turns = 4096 * plain / (2 * np.pi)
    often, seldom = turns > 2 * yarn.beta_fast, turns < 0.5 * yarn.beta_slow
    assert often.sum() > 10
    assert seldom.sum() > 10
    np.testing.assert_allclose(scaled[often], plain[often], rtol=1e-6)
    np.testing.assert_allclose(scaled[seldom], plain[seldom] / 16, rtol=1e-6)
    ratios = (scaled / plain)[~often & ~seldom]
    assert (np.diff(ratios) <= 1e-6).all()
    x = np.ones((1, 1, 128), np.float32)
    np.testing.assert_allclose(rotated(x, yarn, [0]), 1.2 * x, rtol=1e-6)
