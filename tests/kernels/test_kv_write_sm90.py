"""The fused rope and KV write: kernel (interpreted) and XLA form against the float32 oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.kv_write.api import rope_and_write
from pallas_kernels.kv_write.kv_write_sm90 import (
    KVWriteConfig,
    refuses_kv_write_sm90,
    rope_and_write_sm90,
)
from pallas_kernels.kv_write.narrow import FP8, is_narrow, narrow, widened
from pallas_kernels.kv_write.reference import rope_and_write_reference
from pallas_kernels.kv_write.specs import SPECS, KVWriteSpec

TOKENS, PAGES = 5, 6


def _inputs(spec: KVWriteSpec, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, ...]:
    """Tokens 1, 3 and 4 have pages that are none of the six: they must be dropped."""
    rng = np.random.default_rng(spec.heads * spec.dim)
    width = (spec.heads + 2 * spec.kv_heads) * spec.dim
    angle = rng.uniform(0, 100, size=(TOKENS, spec.dim // 2))
    shapes = (TOKENS, width), (PAGES, 2, spec.kv_heads, spec.page, spec.stored), spec.dim, spec.dim
    qkv, kv, *norms = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    kv = narrow(kv, spec.pages or dtype)
    return (
        qkv,
        jnp.asarray(np.cos(angle), jnp.float32),
        jnp.asarray(np.sin(angle), jnp.float32),
        jnp.asarray([3, PAGES, 1, -1, 2**31 - 1], jnp.int32),
        jnp.asarray([spec.page - 1, 2, 5, 0, 0], jnp.int32),
        kv,
        *(norms if spec.qk_norm else ()),
    )


def _check(
    got: tuple[jax.Array, jax.Array],
    args: tuple[jax.Array, ...],
    interleaved: bool = False,
    head_dim: int | None = None,
) -> None:
    want = rope_and_write_reference(*args, interleaved=interleaved, head_dim=head_dim)
    for a, b in zip(got, want, strict=True):
        # One rounding of the result; with a norm, its two roundings on top; eight bits hold four.
        rtol = 2**-8 if len(args) == 6 else 2**-6
        rtol += 2**-4 if is_narrow(a.dtype) else 0
        np.testing.assert_allclose(widened(a, jnp.float32), b, rtol=rtol, atol=2e-2)
    kept = np.ones(args[5].shape, bool)
    for token in (0, 2):
        kept[int(args[3][token]), :, :, int(args[4][token])] = False
    np.testing.assert_array_equal(np.asarray(got[1])[kept], np.asarray(args[5])[kept])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_kernel_equals_the_reference(spec: KVWriteSpec) -> None:
    args = _inputs(spec)
    got = rope_and_write_sm90(*args, interpret=plgpu.InterpretGPUParams())
    _check(got, args, head_dim=spec.dim)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_xla_form_equals_the_reference(spec: KVWriteSpec) -> None:
    args = _inputs(spec)
    got = rope_and_write(*args, platform="cpu", head_dim=spec.dim)
    _check(got, args, head_dim=spec.dim)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("share", [1, 2])
def test_what_the_kernel_refuses_goes_to_xla(share: int, interleaved: bool) -> None:
    """Part of a head (GLM), interleaved pairs; as the whole operation on Hopper would take them."""
    qkv, cos, sin, *rest = _inputs(SPECS[3])
    platform = "cpu" if (share, interleaved) == (1, False) else "sm_90"
    args = (qkv, cos[:, ::share], sin[:, ::share], *rest)
    got = rope_and_write(*args, platform=platform, interleaved=interleaved)
    _check(got, args, interleaved)


def test_a_token_has_the_same_bits_alone_and_in_company() -> None:
    args = _inputs(SPECS[3])
    q, kv = rope_and_write_sm90(*args, interpret=plgpu.InterpretGPUParams())
    page, offset = int(args[3][2]), int(args[4][2])
    alone = [x[2:3] for x in args[:5]]
    q_alone, kv_alone = rope_and_write_sm90(*alone, *args[5:], interpret=plgpu.InterpretGPUParams())
    np.testing.assert_array_equal(q[2], q_alone[0])
    np.testing.assert_array_equal(kv[page, :, :, offset], kv_alone[page, :, :, offset])


def test_kernel_has_no_race() -> None:
    args = _inputs(SPECS[5])
    _check(rope_and_write_sm90(*args, interpret=plgpu.InterpretGPUParams(detect_races=True)), args)


@pytest.mark.parametrize(
    "spec,vector", [*((spec, 8) for spec in SPECS), (SPECS[0], 4), (SPECS[0], 2)], ids=str
)
def test_every_spec_lowers_for_cuda_and_aliases_the_cache(spec: KVWriteSpec, vector: int) -> None:
    args = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _inputs(spec))

    def two_layers(first: Any, second: Any, *rest: Any) -> Any:
        config = KVWriteConfig(vector)
        qkv, cos, sin, pages, offsets, *norms = rest
        q, first = rope_and_write_sm90(qkv, cos, sin, pages, offsets, first, *norms, config=config)
        own = q[..., : spec.dim].reshape(TOKENS, -1)
        flat = jnp.concatenate([own, qkv[:, own.shape[1] :]], axis=1)
        q, second = rope_and_write_sm90(
            flat, cos, sin, pages, offsets, second, *norms, config=config
        )
        return first, second, q

    rest = (*args[:5], *args[6:])
    lowered = jax.jit(two_layers, donate_argnums=(0, 1)).trace(args[5], args[5], *rest)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    launches = [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]
    assert len(launches) == 1, "two layers share one lowered kernel"
    assert "output_operand_alias<" in launches[0], "the launch must alias the cache"
    main = next(line for line in text.splitlines() if "func.func public @main" in line)
    assert main.count("tf.aliasing_output") == 2, "both caches are donated"


def test_refusals_name_the_shape() -> None:
    ok = (32, 8, 128, jnp.bfloat16, "sm_90")
    assert refuses_kv_write_sm90(*ok) is None
    for index, bad, word in (
        (0, 256, "register"),
        (2, 100, "100"),
        (3, jnp.float32, "float32"),
        (4, "cpu", "cpu"),
    ):
        args = [*ok]
        args[index] = bad
        reason = refuses_kv_write_sm90(*args)  # pyright: ignore[reportArgumentType]
        assert reason is not None and word in reason
    assert refuses_kv_write_sm90(*ok, rotated=128) is None
    assert refuses_kv_write_sm90(*ok, pages=FP8) is None
    assert "int8" in str(refuses_kv_write_sm90(*ok, pages=jnp.int8))
    assert "64 of 128" in str(refuses_kv_write_sm90(*ok, rotated=64))
    assert "interleaved" in str(refuses_kv_write_sm90(*ok, interleaved=True))
    padded = (32, 8, 80, jnp.bfloat16, "sm_90")
    assert refuses_kv_write_sm90(*padded) is None
    assert "norms" in str(refuses_kv_write_sm90(*padded, qk_norm=True))


def test_one_norm_weight_alone_is_an_error() -> None:
    args = _inputs(SPECS[3])
    with pytest.raises(ValueError, match="both"):
        rope_and_write(*args[:7], platform="cpu")
