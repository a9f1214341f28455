"""RMSNorm alone and with a residual: the same numbers, and the kernel where the platform has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers.norm import RMSNorm

EPS = 1e-5


def _norm(dtype: str = "float32", platform: str = "cpu", size: int = 64) -> RMSNorm:
    norm = RMSNorm(size, EPS, dtype=jnp.dtype(dtype), platform=platform)
    norm.weight[...] = jnp.linspace(0.5, 1.5, size, dtype=dtype)
    return norm


def _random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def test_norm_of_heads_is_over_the_last_axis() -> None:
    x = np.asarray(_random(3, 2, 64), np.float64)
    want = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * np.linspace(0.5, 1.5, 64)
    np.testing.assert_allclose(_norm()(jnp.asarray(x, jnp.float32)), want, rtol=1e-5)


def test_add_gives_the_norm_of_the_sum_and_the_sum() -> None:
    norm, (x, branch) = _norm(), _random(2, 5, 64)
    normed, total = norm.add(x, branch)
    np.testing.assert_array_equal(total, x + branch)
    np.testing.assert_array_equal(normed, norm(x + branch))


def test_no_branch_adds_nothing() -> None:
    norm, x = _norm(), _random(5, 64)
    normed, total = norm.add(x, None)
    assert total is x
    np.testing.assert_array_equal(normed, norm(x))


@pytest.mark.parametrize(
    ("dtype", "platform", "size", "kernel"),
    [
        ("bfloat16", "sm_90", 256, True),
        ("bfloat16", "cuda", 256, False),
        ("float32", "sm_90", 256, False),
        ("bfloat16", "sm_90", 100, False),
    ],
)
def test_the_kernel_adds_and_norms_where_it_can(
    dtype: str, platform: str, size: int, kernel: bool
) -> None:
    norm = _norm(dtype, platform, size)
    x = jax.ShapeDtypeStruct((4, size), jnp.dtype(dtype))
    lowered = jax.jit(lambda x, branch: norm.add(x, branch)).trace(x, x)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert ("@mosaic_gpu_v2" in text) is kernel
