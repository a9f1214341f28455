"""The Hopper decode kernel: interpreter against a float32 oracle, lowering for CUDA, work list.

The race detector does not see what wgmma reads. Reading too early shows as NaN, because the
interpreter fills memory with it; waits that are left out fail the barriers' own checks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.api import paged_decode
from pallas_kernels.attention.decode_config import DecodeConfig, refuses_decode_sm90
from pallas_kernels.attention.decode_plan import max_splits, plan_decode
from pallas_kernels.attention.decode_problem import make_decode_problem, right_answer
from pallas_kernels.attention.decode_sm90 import DecodeOp, paged_decode_sm90
from pallas_kernels.attention.decode_specs import MIXED, SMALL, SPEED, DecodeSpec

# Stale NaN keys do reach the scores, where they are masked; the interpreter multiplies in numpy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")

TINY = DecodeConfig(split_tokens=128, stages=2, num_ctas=3)


def attend(spec: DecodeSpec, config: DecodeConfig, races: bool = False) -> np.ndarray:
    problem = make_decode_problem(spec)
    op = DecodeOp(spec.dim**-0.5, spec.window, spec.softcap, config, True, races)
    plan = plan_decode(
        problem.seq_lens,
        max_pages=spec.width,
        page_size=spec.page,
        window=spec.window,
        config=config,
    )
    out = paged_decode_sm90(problem.q, problem.kv, problem.block_tables, plan, op=op)
    return np.asarray(out, np.float32)


def check(spec: DecodeSpec, config: DecodeConfig, races: bool = False) -> None:
    got = attend(spec, config, races)
    want = np.asarray(right_answer(spec, make_decode_problem(spec), spec.dim**-0.5))
    for row, length in enumerate(spec.lens):
        assert np.linalg.norm(got[row] - want[row]) <= 4e-3 * np.linalg.norm(want[row]), row
        if length == 0:
            assert not got[row].any()


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_kernel_equals_the_oracle(spec: DecodeSpec) -> None:
    check(spec, TINY)


def test_other_tile_sizes_equal_the_oracle() -> None:
    check(SMALL[4], DecodeConfig(split_tokens=256, block=128, stages=3, num_ctas=2))


def test_no_race(capfd: pytest.CaptureFixture[str]) -> None:
    """One CTA, so that a stage whose tail was cleared is filled again."""
    check(SMALL[1], dataclasses.replace(TINY, num_ctas=1), races=True)
    captured = capfd.readouterr()
    assert "RACE" not in captured.out + captured.err


def test_bits_of_a_row_do_not_depend_on_the_batch() -> None:
    """Nor on how many CTAs there are, nor on the width of the tables."""
    spec = DecodeSpec("", 4, 1, 64, 64, (200, 70))
    full = make_decode_problem(spec)
    plan = plan_decode(full.seq_lens[:1], max_pages=11, page_size=64, config=TINY)
    tables = jnp.pad(full.block_tables[:1], ((0, 0), (0, 11 - spec.width)))
    op = DecodeOp(spec.dim**-0.5, None, None, dataclasses.replace(TINY, num_ctas=1), True)
    got = paged_decode_sm90(full.q[:1], full.kv, tables, plan, op=op)
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), attend(spec, TINY)[0])


LOWERED = [(spec, "bfloat16") for spec in (*SMALL, *MIXED, *SPEED)]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [*LOWERED, (SMALL[1], "float16")],
    ids=lambda value: getattr(value, "name", value),
)
def test_lowers_for_cuda_without_a_gpu(spec: DecodeSpec, dtype: str) -> None:
    config = DecodeConfig()
    shapes = (
        jax.ShapeDtypeStruct((len(spec.lens), spec.heads, spec.dim), dtype),
        jax.ShapeDtypeStruct((99, 2, spec.kv_heads, spec.page, spec.dim), dtype),
        jax.ShapeDtypeStruct((len(spec.lens), spec.width), jnp.int32),
        jax.ShapeDtypeStruct((len(spec.lens),), jnp.int32),
    )

    @jax.jit
    def two_layers(q: jax.Array, kv: jax.Array, tables: jax.Array, lens: jax.Array) -> jax.Array:
        plan = plan_decode(
            lens, max_pages=spec.width, page_size=spec.page, window=spec.window, config=config
        )
        for _ in range(2):
            q = paged_decode(
                q,
                kv,
                tables,
                lens,
                scale=0.1,
                platform="sm_90",
                window=spec.window,
                softcap=spec.softcap,
                config=config,
                plan=plan,
            )
        return q

    text = two_layers.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    splits = max_splits(spec.width, spec.page, spec.window, config)
    assert text.count("mosaic_gpu_v2") == (1 if splits == 1 else 2), "lowered once for all layers"


@pytest.mark.parametrize("window", [None, 1, 130, 300])
def test_plan_covers_every_row_once_and_longest_pieces_first(window: int | None) -> None:
    lens = np.array([0, 700, 1, 128, 129, 0, 513, 256], np.int32)
    plan = plan_decode(jnp.asarray(lens), max_pages=11, page_size=64, window=window, config=TINY)
    items = np.asarray(plan.items)[: int(plan.num_items[0])]
    first = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0) // 128
    slots = []
    for row, length in enumerate(lens):
        mine = items[items[:, 0] == row]
        order = np.argsort(mine[:, 1])
        count = max(1, -(-length // 128) - first[row])
        np.testing.assert_array_equal(mine[order, 1], first[row] + np.arange(count))
        assert (mine[:, 3] == length).all()
        assert plan.row_splits[row] == count <= max_splits(11, 64, window, TINY)
        if count == 1:
            assert mine[0, 2] == -1
        else:
            np.testing.assert_array_equal(mine[order, 2], plan.row_slots[row] + np.arange(count))
            slots += mine[:, 2].tolist()
    assert sorted(slots) == list(range(len(slots)))
    if window is None:
        pieces = np.minimum(lens[items[:, 0]] - items[:, 1] * 128, 128)
        assert (np.diff(pieces) <= 0).all()


def test_refusals_name_the_reason() -> None:
    def reason(
        *shape: int, dtype: str = "bfloat16", platform: str = "sm_90", stages: int = 3
    ) -> str:
        heads, kv_heads, dim, page = shape
        config = DecodeConfig(stages=stages)
        return refuses_decode_sm90(heads, kv_heads, dim, page, dtype, platform, config) or ""

    assert reason(32, 8, 128, 64) == ""
    assert "sm_90, not cpu" in reason(32, 8, 128, 64, platform="cpu")
    assert "float32" in reason(32, 8, 128, 64, dtype="float32")
    assert "not 96" in reason(32, 8, 96, 64)
    assert "not 8" in reason(32, 8, 128, 8)
    assert "not 65" in reason(65, 1, 128, 64)
    assert "shared memory" in reason(32, 8, 128, 64, stages=7)


def test_the_api_falls_back_to_xla_and_says_what_it_cannot_do() -> None:
    spec = SMALL[2]
    problem = make_decode_problem(spec)
    got = paged_decode(*problem, scale=0.125, platform="cpu")
    want = np.asarray(right_answer(spec, problem, 0.125))
    error = np.asarray(got, np.float32) - want
    assert np.linalg.norm(error) <= 1e-2 * np.linalg.norm(want)
    with pytest.raises(ValueError, match="softcap needs the kernel"):
        paged_decode(*problem, scale=0.125, platform="cpu", softcap=3.0)
