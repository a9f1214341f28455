"""Residual add and RMS norm: kernel (interpreted) and XLA form against the float32 oracle."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.norm.add_rms_norm_sm90 import (
    NormConfig,
    add_rms_norm_sm90,
    default_norm_config,
    refuses_add_rms_norm_sm90,
)
from pallas_kernels.norm.api import add_rms_norm
from pallas_kernels.norm.reference import add_rms_norm_reference
from pallas_kernels.norm.specs import SMALL, NormSpec
from pallas_kernels.norm.xla import add_rms_norm_xla

EPS = 1e-5
INTERPRET = plgpu.InterpretGPUParams()
ROWS = (1, 2)
# One of each way to spread a row over the threads.
SPREADS = tuple(spec for spec in SMALL if spec.width in (576, 896, 2560, 4096))


def _inputs(spec: NormSpec, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last row is so small that eps decides its norm."""
    rng = np.random.default_rng(spec.width)
    x, branch = rng.normal(size=(2, *spec))
    x[-1], branch[-1] = 1e-3 * x[-1], 1e-3 * branch[-1]
    weight = 1 + 0.1 * rng.normal(size=spec.width)
    return jnp.asarray(x, dtype), jnp.asarray(branch, dtype), jnp.asarray(weight, dtype)


def _check(got: tuple[jax.Array, jax.Array], args: tuple[jax.Array, ...]) -> None:
    normed, total = (np.asarray(part, np.float32) for part in got)
    want, want_total = add_rms_norm_reference(*args, eps=EPS)
    # One rounding of the sum; of the norm, the sum's and its own two.
    np.testing.assert_allclose(total, want_total, rtol=2**-8)
    np.testing.assert_allclose(normed, want, rtol=2**-6)


@pytest.mark.parametrize("spec", SPREADS, ids=str)
def test_kernel_equals_the_reference_and_the_bits_of_the_xla_form(spec: NormSpec) -> None:
    args = _inputs(spec)
    got = add_rms_norm_sm90(*args, eps=EPS, interpret=INTERPRET)
    _check(got, args)
    # Compiled, as the interpreter's steps are: XLA then leaves out roundings between products.
    normed, total = jax.jit(partial(add_rms_norm_xla, eps=EPS))(*args)
    np.testing.assert_array_equal(got[1], total)
    # Only the order of the sum of squares differs, and that rarely reaches the 8 bits kept.
    assert np.mean(np.asarray(got[0]) != np.asarray(normed)) < 0.01


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_xla_form_equals_the_reference(dtype: str) -> None:
    args = _inputs(SMALL[0], dtype)
    _check(add_rms_norm(*args, eps=EPS, platform="cpu"), args)


@pytest.mark.parametrize("spec", SPREADS[1:3], ids=str)
def test_bits_of_a_row_depend_on_no_other_row(spec: NormSpec) -> None:
    x, branch, weight = _inputs(spec)
    alone = add_rms_norm_sm90(x[1:], branch[1:], weight, eps=EPS, interpret=INTERPRET)
    for rows in ROWS:
        config = NormConfig(rows)
        batch = add_rms_norm_sm90(x, branch, weight, eps=EPS, config=config, interpret=INTERPRET)
        for one, all_rows in zip(alone, batch, strict=True):
            np.testing.assert_array_equal(one[0], all_rows[1])


def test_a_row_that_no_group_divides_is_written() -> None:
    x, branch, weight = _inputs(SMALL[0])
    args = x[:1], branch[:1], weight
    _check(add_rms_norm_sm90(*args, eps=EPS, config=NormConfig(2), interpret=INTERPRET), args)


@pytest.mark.parametrize("spec", SPREADS[1:3], ids=str)
def test_kernel_has_no_race(spec: NormSpec, capfd: pytest.CaptureFixture[str]) -> None:
    args = _inputs(spec)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    _check(add_rms_norm_sm90(*args, eps=EPS, config=NormConfig(2), interpret=interpret), args)
    captured = capfd.readouterr()
    assert "RACE DETECTED" not in captured.out + captured.err


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_every_spec_lowers_for_cuda(spec: NormSpec, rows: int) -> None:
    wide = jax.ShapeDtypeStruct(spec, jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((spec.width,), jnp.bfloat16)

    def two_layers(x: Any, branch: Any, weight: Any) -> Any:
        config = NormConfig(rows)
        branch, x = add_rms_norm_sm90(x, branch, weight, eps=EPS, config=config)
        return add_rms_norm_sm90(x, branch, weight, eps=EPS, config=config)

    lowered = jax.jit(two_layers).trace(wide, wide, weight)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    launches = [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]
    assert len(launches) == 1, "two layers share one lowered kernel"


def test_refusals_name_the_shape() -> None:
    ok = (4096, jnp.bfloat16, "sm_90")
    assert refuses_add_rms_norm_sm90(*ok) is None
    for index, bad, word in (
        (0, 100, "100"),
        (0, 64 * 127, "register"),
        (0, 16384, "register"),
        (1, jnp.float32, "float32"),
        (2, "cpu", "cpu"),
    ):
        args = [*ok]
        args[index] = bad
        reason = refuses_add_rms_norm_sm90(*args)  # pyright: ignore[reportArgumentType]
        assert reason is not None and word in reason


def test_many_tokens_share_a_read_of_the_weight() -> None:
    assert default_norm_config(64, 4096).rows == 1
    assert default_norm_config(8192, 4096).rows == 2
    assert default_norm_config(8192, 8192).rows == 1  # its registers would fill the processor
