"""The Hopper prefill kernel: interpreter against a float32 oracle, lowering for CUDA, tile map."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.prefill_problem import (
    PrefillProblem,
    make_prefill_problem,
    right_answer,
)
from pallas_kernels.attention.prefill_sm90 import (
    default_prefill_config,
    paged_prefill_sm90,
    refuses_prefill_sm90,
)
from pallas_kernels.attention.prefill_specs import MIXED, SMALL, SPEED, PrefillSpec
from pallas_kernels.attention.prefill_tiles import PrefillConfig, PrefillTiles, make_prefill_tiles
from pallas_kernels.attention.reference import paged_attention_reference
from pallas_kernels.kv_write.narrow import FP8

# Stale NaN keys do reach the scores, where they are masked; the interpreter multiplies in numpy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")


LEFT = 3.0  # the output of decode rows, which the kernel must not touch


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def tiles_of(spec: PrefillSpec, problem: PrefillProblem, config: PrefillConfig) -> PrefillTiles:
    return make_prefill_tiles(
        problem.query_start_loc, problem.seq_lens, problem.num_decode_rows, spec.tokens, config
    )


def attend(
    spec: PrefillSpec,
    problem: PrefillProblem,
    config: PrefillConfig,
    interpret: plgpu.InterpretGPUParams | bool,
) -> jax.Array:
    tiles = tiles_of(spec, problem, config)
    return paged_prefill_sm90(
        problem.q,
        problem.kv,
        problem.block_tables,
        tiles,
        jnp.full_like(problem.q, LEFT),
        scale=spec.dim**-0.5,
        window=spec.window,
        variant=spec.variant,
        config=config,
        interpret=interpret,
    )


def config_of(spec: PrefillSpec, **changes: Any) -> PrefillConfig:
    return dataclasses.replace(
        default_prefill_config(spec.heads, spec.kv_heads, spec.dim), **changes
    )


def check(spec: PrefillSpec, config: PrefillConfig, *, races: bool = False) -> None:
    problem = make_prefill_problem(spec)
    params = plgpu.InterpretGPUParams(detect_races=races)
    got = np.asarray(attend(spec, problem, config, params), np.float32)
    want = np.array(right_answer(spec, problem, spec.dim**-0.5))
    want[: spec.decode_rows] = LEFT
    np.testing.assert_allclose(got, want, atol=0.02, rtol=0.02)
    assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_kernel_equals_the_oracle(spec: PrefillSpec) -> None:
    check(spec, config_of(spec, num_ctas=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"heads_per_tile": 1, "num_ctas": 3, "issuers": 2},
        {"block_kv": 64, "stages": 3, "take_turns": False, "num_ctas": 1},
    ],
    ids=str,
)
def test_other_tile_sizes_equal_the_oracle(changes: dict[str, Any]) -> None:
    check(SMALL[1], config_of(SMALL[1], **changes))


@pytest.mark.parametrize("spec", [SMALL[1], SMALL[7]], ids=lambda spec: spec.name)
def test_no_race(spec: PrefillSpec, capfd: pytest.CaptureFixture[str]) -> None:
    check(spec, config_of(spec, num_ctas=1), races=True)
    captured = capfd.readouterr()
    assert "RACE" not in captured.out + captured.err


def test_oracle_equals_the_reference() -> None:
    spec = SMALL[2]
    problem = make_prefill_problem(spec, "float32")
    slots = np.repeat(np.arange(len(spec.rows) + 1), [*(new for _, new in spec.rows), spec.padding])
    positions = [cached + i for cached, new in spec.rows for i in range(new)]
    want = paged_attention_reference(
        problem.q,
        problem.kv,
        problem.block_tables,
        jnp.asarray(slots, jnp.int32),
        jnp.asarray([*positions, *[-1] * spec.padding], jnp.int32),
        scale=0.3,
        window=spec.window,
    )
    got = right_answer(spec, problem, 0.3)
    np.testing.assert_allclose(got[spec.decode_rows :], want[spec.decode_rows :], atol=1e-5)


def abstract_problem(spec: PrefillSpec, dtype: str) -> PrefillProblem:
    rows = len(spec.rows)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    parts: Any = (
        jax.ShapeDtypeStruct((spec.tokens, spec.heads, spec.dim), dtype),
        jax.ShapeDtypeStruct((99, 2, spec.kv_heads, spec.page, spec.stored), spec.pages or dtype),
        ints(rows, 16),
        ints(rows + 1),
        ints(rows),
        ints(),
    )
    return PrefillProblem(*parts)


@pytest.mark.parametrize(
    ("spec", "dtype", "issuers"),
    [
        # The last two of MIXED are to the compiler what the last two of SMALL are, and SPEED is
        # the first of MIXED.
        *((spec, "bfloat16", 1) for spec in SMALL + MIXED[:-2]),
        (MIXED[0], "float16", 1),
        (SMALL[5], "bfloat16", 4),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_lowers_for_cuda(spec: PrefillSpec, dtype: str, issuers: int) -> None:
    problem = abstract_problem(spec, dtype)
    config = config_of(spec, issuers=issuers)
    traced = jax.jit(lambda p: attend(spec, p, config, False)).trace(problem)
    assert "mosaic_gpu_v2" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_layers_share_one_kernel() -> None:
    spec = SPEED[1]
    config = config_of(spec)
    problem = abstract_problem(spec, "bfloat16")

    def layers(problem: PrefillProblem) -> jax.Array:
        tiles, q = tiles_of(spec, problem, config), problem.q
        for _ in range(3):
            rest = problem.kv, problem.block_tables, tiles, jnp.zeros_like(q)
            q = paged_prefill_sm90(q, *rest, scale=0.1, config=config)
        return q

    text = jax.jit(layers).trace(problem).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("heads_per_tile", [1, 2])
@pytest.mark.parametrize("spec", SMALL[:7] + MIXED[:6], ids=lambda spec: spec.name)
def test_every_token_is_in_exactly_one_tile(spec: PrefillSpec, heads_per_tile: int) -> None:
    config = PrefillConfig(heads_per_tile=heads_per_tile)
    tiles = tiles_of(spec, make_prefill_problem(spec), config)
    count = int(tiles.count[0])
    assert 0 < count <= len(tiles.table)
    want = {}  # slot and position of every token but decode tokens; padding has seq_len 0
    token = 0
    for slot, (cached, new) in enumerate(spec.rows):
        for position in range(cached, cached + new):
            if slot >= spec.decode_rows:
                want[token] = slot, position
            token += 1
    want |= {padding: (0, -1) for padding in range(token, spec.tokens)}
    got: dict[int, tuple[int, int]] = {}
    steps = []
    for slot, group, position, low, high, seq_len, *_ in np.asarray(tiles.table)[:count]:
        assert 0 <= low < high <= config.tokens
        assert group >= 0
        for row in range(low, high):
            assert group * 8 + row not in got
            got[group * 8 + row] = (slot, position + row) if seq_len else (0, -1)
        steps.append(-(-min(position + high, seq_len) // config.block_kv))
    assert got == want
    assert steps == sorted(steps, reverse=True), "the dearest tiles come first"


def test_bits_of_a_row_do_not_depend_on_the_batch() -> None:
    spec = PrefillSpec("pair", 2, 1, 64, 32, ((30, 41), (140, 13)), padding=10)
    problem = make_prefill_problem(spec)
    params = plgpu.InterpretGPUParams()
    together = attend(spec, problem, config_of(spec, num_ctas=2), params)
    alone = dataclasses.replace(spec, rows=spec.rows[1:], padding=0)
    start = int(problem.query_start_loc[1])
    row = PrefillProblem(
        problem.q[start : start + 13],
        problem.kv,
        problem.block_tables[1:],
        problem.query_start_loc[1:] - start,
        problem.seq_lens[1:],
        problem.num_decode_rows,
    )
    got = attend(alone, row, config_of(alone, num_ctas=1), params)
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(together[start : start + 13], np.float32)
    )


def test_refusals_name_the_reason() -> None:
    good = (32, 8, 128, 64, jnp.bfloat16, "sm_90")
    assert refuses_prefill_sm90(*good) is None
    for index, value, word in [
        (0, 30, "KV heads"),
        (2, 96, "head dims"),
        (3, 48, "pages"),
        (4, jnp.float32, "float32"),
        (5, "cpu", "cpu"),
    ]:
        shape = [*good[:index], value, *good[index + 1 :]]
        assert word in (refuses_prefill_sm90(*shape) or "")
    for dim, pages, word in [(128, "int8", "int8"), (256, FP8, "128 channels")]:
        shape = (*good[:2], dim, *good[3:], pages)
        assert word in (refuses_prefill_sm90(*shape) or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"heads_per_tile": 3},
        {"block_kv": 100},
        {"stages": 1},
        {"num_ctas": 0},
        {"issuers": 3},
        {"consumer_registers": 240},
    ],
    ids=str,
)
def test_impossible_configs_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        PrefillConfig(**changes)


def test_configs_that_do_not_fit_the_shape_are_refused() -> None:
    spec = SMALL[4]  # 3 heads per KV head, pages of 128
    problem = make_prefill_problem(spec)
    for config in (
        PrefillConfig(heads_per_tile=2),
        PrefillConfig(heads_per_tile=1, block_kv=192),
        PrefillConfig(heads_per_tile=1, stages=6),
    ):
        with pytest.raises(ValueError, match=r"heads_per_tile|page size|shared memory"):
            attend(spec, problem, config, False)


def test_more_registers_than_a_thread_block_has_are_refused() -> None:
    """On a card the launch would wait for them for ever."""
    with pytest.raises(ValueError, match="504 registers"):
        PrefillConfig(consumer_registers=240, producer_registers=32)
