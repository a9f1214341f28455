"""The gated product: kernel (interpreted) and XLA form against the float32 oracle, lowering."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.bench.gated_matmul import gated_inputs
from pallas_kernels.gated_matmul.activations import ACTIVATIONS, XLA_ACTIVATIONS
from pallas_kernels.gated_matmul.api import gated_matmul
from pallas_kernels.gated_matmul.gated_sm90 import (
    GatedConfig,
    gated_matmul_sm90,
    refuses_gated_sm90,
    share,
)
from pallas_kernels.gated_matmul.reference import gated_matmul_reference
from pallas_kernels.gated_matmul.specs import MODELS, SMALL, SPEED, GatedSpec


def interpreted(spec: GatedSpec, activation: str, races: bool = False, **changes: Any) -> Any:
    x, weight = gated_inputs(spec)
    got = gated_matmul_sm90(
        x,
        weight,
        activation=activation,
        config=GatedConfig(**{"num_ctas": 2, **changes}),
        interpret=plgpu.InterpretGPUParams(detect_races=races),
    )
    want = np.asarray(gated_matmul_reference(x, weight, activation=activation))
    # One rounding to bfloat16 of a float32 result.
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2**-8, atol=1e-4)
    return got


@pytest.mark.parametrize("spec", SMALL, ids=str)
def test_kernel_equals_the_oracle(spec: GatedSpec) -> None:
    interpreted(spec, "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    interpreted(SMALL[1], activation)


@pytest.mark.parametrize(
    "changes", [{"num_ctas": 3}, {"band": 1, "stages": 2}, {"tile_n": 64}], ids=str
)
def test_other_configs_have_the_same_bits(changes: dict[str, Any]) -> None:
    usual = interpreted(SMALL[0], "silu")
    np.testing.assert_array_equal(usual, interpreted(SMALL[0], "silu", **changes))


@pytest.mark.parametrize("total", [1, 8, 131, 132, 133, 224, 1000])
def test_every_tile_is_of_one_thread_block(total: int) -> None:
    """The interpreter forgives tiles outside of the product, a GPU does not."""
    counts = np.asarray(share(total, jnp.arange(132), 132))
    tiles = [turn * 132 + cta for cta, count in enumerate(counts) for turn in range(count)]
    assert sorted(tiles) == list(range(total))


def test_no_race(capfd: pytest.CaptureFixture[str]) -> None:
    interpreted(SMALL[0], "silu", races=True)
    captured = capfd.readouterr()
    assert "RACE" not in captured.out + captured.err


@pytest.mark.parametrize("activation", XLA_ACTIVATIONS)
@pytest.mark.parametrize("platform", ["cpu", "sm_90"])
def test_what_the_kernel_refuses_is_plain_xla(activation: str, platform: str) -> None:
    x, weight = gated_inputs(GatedSpec(3, 64, 32))
    got = np.asarray(gated_matmul(x, weight, activation=activation, platform=platform), np.float32)
    want = np.asarray(gated_matmul_reference(x, weight, activation=activation))
    np.testing.assert_allclose(got, want, rtol=2**-5, atol=2e-2)


@pytest.mark.parametrize("spec", MODELS + SPEED[-1:], ids=str)
def test_lowers_for_cuda(spec: GatedSpec) -> None:
    x = jax.ShapeDtypeStruct(spec[:2], jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((2 * spec.inner, spec.width), jnp.bfloat16)

    def two_layers(x: Any, weight: Any) -> Any:
        for _ in range(2):
            y = gated_matmul_sm90(x, weight, activation="silu")
            x = x + y[:, : spec.width]
        return x

    text = jax.jit(two_layers).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1, "two layers share one lowered kernel"


def test_refusals_name_the_reason() -> None:
    good = (1024, 4096, 14336, jnp.bfloat16, "silu", "sm_90")
    assert refuses_gated_sm90(*good) is None
    for index, value, word in [
        (0, 1000, "not 1000"),
        (0, 128, "not 128"),
        (0, 512, "idle"),
        (1, 100, "not 100"),
        (2, 100, "and 100"),
        (3, jnp.float32, "float32"),
        (4, "gelu", "gelu"),
        (5, "cpu", "cpu"),
    ]:
        case: Any = (*good[:index], value, *good[index + 1 :])
        assert word in str(refuses_gated_sm90(*case))


@pytest.mark.parametrize(
    "fields",
    [{"tile_n": 256}, {"num_ctas": 0}, {"stages": 1}, {"stages": 9}],
    ids=str,
)
def test_impossible_configs_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        GatedConfig(**fields)
