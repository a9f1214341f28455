"""The Hopper kernel of prefill over latents: interpreter against a float32 oracle, lowering."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.latent_prefill_sm90 import (
    make_latent_tiles,
    paged_latent_prefill_sm90,
    refuses_latent_prefill_sm90,
)
from pallas_kernels.attention.prefill_problem import (
    PrefillProblem,
    make_prefill_problem,
    right_answer,
)
from pallas_kernels.attention.prefill_specs import LATENT_MIXED, LATENT_SMALL, PrefillSpec
from pallas_kernels.kv_write.narrow import FP8

# Stale NaN keys do reach the scores, where they are masked; the interpreter multiplies in numpy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")

LEFT = 3.0  # the output of decode rows, which the kernel must not touch


def attend(spec: PrefillSpec, problem: PrefillProblem, num_ctas: int, interpret: Any) -> jax.Array:
    q, kv, tables, starts, lens, num_decode_rows = problem
    tiles = make_latent_tiles(starts, lens, num_decode_rows, q.shape[0], spec.heads)
    out = jnp.full((*q.shape[:2], spec.value_dim), LEFT, q.dtype)
    scale = spec.dim**-0.5
    rest: dict[str, Any] = {"scale": scale, "num_ctas": num_ctas, "interpret": interpret}
    return paged_latent_prefill_sm90(q, kv, tables, tiles, out, **rest)


@functools.cache
def answers(spec: PrefillSpec) -> np.ndarray:
    params = plgpu.InterpretGPUParams(detect_races=True)
    return np.asarray(attend(spec, make_prefill_problem(spec), 2, params), np.float32)


@pytest.mark.parametrize("spec", LATENT_SMALL, ids=lambda spec: spec.name)
def test_kernel_equals_the_oracle_without_a_race(
    spec: PrefillSpec, capfd: pytest.CaptureFixture[str]
) -> None:
    got = answers(spec)
    want = np.array(right_answer(spec, make_prefill_problem(spec), spec.dim**-0.5))
    want[: spec.decode_rows] = LEFT
    np.testing.assert_allclose(got, want, atol=0.02, rtol=0.02)
    assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)
    captured = capfd.readouterr()
    assert "RACE" not in captured.out + captured.err


def test_bits_of_a_row_do_not_depend_on_the_batch() -> None:
    """In another order its tiles begin elsewhere; the program is the same."""
    spec = LATENT_SMALL[0]
    q, kv, tables, starts, lens, num_decode_rows = make_prefill_problem(spec)
    first, second, end = (int(start) for start in starts[1:4])
    order = np.array([0, 2, 1, 3])
    moved = np.r_[:first, second:end, first:second, end : len(q)]
    new = np.diff(np.asarray(starts))[order]
    other = PrefillProblem(
        q[moved],
        kv,
        tables[order],
        jnp.asarray(np.cumsum([0, *new]), jnp.int32),
        lens[order],
        num_decode_rows,
    )
    params = plgpu.InterpretGPUParams(detect_races=True)
    got = np.asarray(attend(spec, other, 2, params), np.float32)
    np.testing.assert_array_equal(got, answers(spec)[moved])


def test_layers_share_one_kernel_that_lowers_for_cuda() -> None:
    spec = LATENT_MIXED[0]
    rows, page = len(spec.rows), (spec.page, spec.dim)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    shapes: Any = (
        jax.ShapeDtypeStruct((spec.tokens, spec.heads, spec.dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((99, 1, 1, *page), jnp.bfloat16),
        *(ints(shape) for shape in ((rows, 16), (rows + 1,), (rows,), ())),
    )
    problem = PrefillProblem(*shapes)

    def layers(problem: PrefillProblem) -> list[jax.Array]:
        return [attend(spec, problem._replace(q=problem.q + i), 132, False) for i in range(2)]

    text = jax.jit(layers).trace(problem).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1


def test_refusals_name_the_reason() -> None:
    good = (16, 1, 576, 512, 64, jnp.bfloat16, "sm_90")
    assert refuses_latent_prefill_sm90(*good) is None
    for index, value, word in [
        (0, 20, "multiple of 8"),
        (1, 2, "all query heads share"),
        (2, 100, "512 in 100"),
        (4, 8, "page sizes"),
        (5, jnp.float32, "float32"),
        (6, "cpu", "cpu"),
    ]:
        shape = [*good[:index], value, *good[index + 1 :]]
        assert word in (refuses_latent_prefill_sm90(*shape) or "")
    for pages, word in [(FP8, "eight bits"), (jnp.float16, "queries' dtype")]:
        assert word in (refuses_latent_prefill_sm90(*good, pages) or "")
