"""Skinny matrix products: kernel (interpreted) and XLA form against the float32 reference."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.matmul.api import refuses_skinny_matmul, skinny_matmul
from pallas_kernels.matmul.reference import gated_matmul_reference, skinny_matmul_reference
from pallas_kernels.matmul.skinny_config import (
    SkinnyConfig,
    default_skinny_config,
    refuses_skinny_sm90,
)
from pallas_kernels.matmul.skinny_sm90 import skinny_matmul_sm90
from pallas_kernels.matmul.specs import SMALL, SPEED, SkinnySpec

INTERPRET = plgpu.InterpretGPUParams()
# Fewer CTAs than tiles, and a ring shorter than K.
PLAIN = SkinnyConfig(consumers=1, block_k=64, num_ctas=2, max_stages=3)
GATED = SkinnyConfig(consumers=2, tiles=2, block_k=64, num_ctas=1, max_stages=2)


def _dtype(spec: SkinnySpec) -> Any:
    return jnp.float32 if spec.wide else jnp.bfloat16


def _inputs(spec: SkinnySpec, rows: int) -> tuple[jax.Array, jax.Array]:
    """Fewer rows are the first of more."""
    rng = np.random.default_rng(spec.k)
    x, w = rng.normal(size=(64, spec.k))[:rows], rng.normal(size=(spec.n, spec.k))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(w * spec.k**-0.5, jnp.bfloat16)


def _kernel(spec: SkinnySpec, rows: int, interpret: Any = INTERPRET) -> jax.Array:
    config = GATED if spec.gated else PLAIN
    kernel = partial(skinny_matmul_sm90, gated=spec.gated, out_dtype=_dtype(spec))
    return kernel(*_inputs(spec, rows), config=config, interpret=interpret)


def _check(got: jax.Array, spec: SkinnySpec, rows: int) -> None:
    reference = gated_matmul_reference if spec.gated else skinny_matmul_reference
    want = np.asarray(reference(*_inputs(spec, rows)))
    assert got.dtype == _dtype(spec) and got.shape == want.shape
    # One rounding; gated: of gate, up, activation and product.
    rounding = 2**-18 if spec.wide else 2**-6 if spec.gated else 2**-8
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_kernel_equals_the_reference(spec: SkinnySpec, rows: int) -> None:
    _check(_kernel(spec, rows), spec, rows)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_xla_form_equals_the_reference(spec: SkinnySpec) -> None:
    product = partial(skinny_matmul, platform="cpu", gated=spec.gated, out_dtype=_dtype(spec))
    _check(product(*_inputs(spec, 3)), spec, 3)


def test_bits_of_a_row_depend_on_no_other_row() -> None:
    few, many = _kernel(SMALL[0], 2), _kernel(SMALL[0], 9)
    np.testing.assert_array_equal(few, many[:2])


def test_kernel_has_no_race(capfd: pytest.CaptureFixture[str]) -> None:
    for spec in SMALL[:3]:
        _check(_kernel(spec, 9, plgpu.InterpretGPUParams(detect_races=True)), spec, 9)
    captured = capfd.readouterr()
    assert "RACE DETECTED" not in captured.out + captured.err


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("spec", SPEED, ids=lambda spec: spec.name)
def test_every_spec_lowers_for_cuda(spec: SkinnySpec, rows: int) -> None:
    x = jax.ShapeDtypeStruct((rows, spec.k), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((spec.n, spec.k), jnp.bfloat16)
    product = partial(skinny_matmul, platform="sm_90", gated=spec.gated, out_dtype=_dtype(spec))
    assert refuses_skinny_matmul(x, w, platform="sm_90", gated=spec.gated) is None

    def two_layers(x: Any, a: Any, b: Any) -> Any:
        return product(x, a), product(x, b)

    text = jax.jit(two_layers).trace(x, w, w).lower(lowering_platforms=("cuda",)).as_text()
    launches = [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]
    assert len(launches) == 1, "two layers share one lowered kernel"


@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize("rows", [8, 16, 64])
def test_every_exchange_within_a_cluster_lowers_for_cuda(rows: int, splits: int) -> None:
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    config = SkinnyConfig(consumers=2, splits=splits, block_k=64, prefetch=rows == 8)
    traced = jax.jit(partial(skinny_matmul_sm90, config=config)).trace(x, w)
    assert "mosaic_gpu_v2" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_refusals_name_the_reason() -> None:
    good = (64, 4096, 4096, jnp.bfloat16, jnp.bfloat16, "sm_90", SkinnyConfig())
    assert refuses_skinny_sm90(*good) is None
    for index, bad, word in (
        (0, 65, "65"),
        (1, 100, "100"),
        (2, 4160, "4160"),
        (3, jnp.float32, "float32"),
        (4, jnp.float16, "float16"),
        (5, "cpu", "cpu"),
        (6, SkinnyConfig(consumers=4, tiles=2, block_k=256), "memory"),
    ):
        args: list[Any] = [*good]
        args[index] = bad
        reason = refuses_skinny_sm90(*args)
        assert reason is not None and word in reason
    reason = refuses_skinny_sm90(*good, gated=True)
    assert reason is not None and "gate" in reason


def test_configs_the_kernel_cannot_run_with_are_refused() -> None:
    bad: list[dict[str, Any]] = [{"consumers": 5}, {"splits": 3}, {"block_k": 32}]
    for fields in [*bad, {"tiles": 4, "consumers": 4}]:
        with pytest.raises(ValueError):
            SkinnyConfig(**fields)


def test_split_of_k_fills_the_device_where_the_weight_has_few_rows() -> None:
    assert default_skinny_config(128256, 4096).splits == 1
    small = default_skinny_config(4096, 14336)
    assert 4096 // small.rows * small.splits >= 2 * 132 // 3
