"""The Hopper decode kernel: interpreter against a float32 oracle, lowering for CUDA, work list.

The race detector does not see what wgmma reads. Reading too early shows as NaN, because the
interpreter fills memory with it; waits that are left out fail the barriers' own checks.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.api import paged_decode
from pallas_kernels.attention.decode_config import DecodeConfig, refuses_decode_sm90
from pallas_kernels.attention.decode_plan import DecodePlan, plan_decode
from pallas_kernels.attention.decode_problem import make_decode_problem, right_answer
from pallas_kernels.attention.decode_sm90 import paged_decode_sm90
from pallas_kernels.attention.decode_sm90_items import DecodeOp
from pallas_kernels.attention.decode_sm90_sums import MASKED, Sum, join
from pallas_kernels.attention.decode_specs import MIXED, SMALL, SPEED, DecodeSpec
from pallas_kernels.attention.variant import CAUSAL
from pallas_kernels.attention.variant_params import param_arrays
from pallas_kernels.kv_write.narrow import FP8

# Stale NaN keys do reach the scores, where they are masked; the interpreter multiplies in numpy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")

TINY = DecodeConfig(split_tokens=128, chunk_tokens=256, stages=2, num_ctas=3)


STATIC = ("max_pages", "page_size", "num_kv_heads", "window", "config")
make_plan = jax.jit(plan_decode, static_argnames=STATIC)


def plan_of(spec: DecodeSpec, config: DecodeConfig) -> DecodePlan:
    return make_plan(
        jnp.asarray(spec.lens, jnp.int32),
        max_pages=spec.width,
        page_size=spec.page,
        num_kv_heads=spec.groups,
        window=spec.window,
        config=config,
    )


def attend(spec: DecodeSpec, config: DecodeConfig, races: bool = False) -> np.ndarray:
    q, kv, tables, _ = make_decode_problem(spec)
    facts = (spec.dim**-0.5, spec.window, spec.variant, config, True, races)
    op = DecodeOp(*facts, value_dim=spec.value_dim)
    params = param_arrays(spec.variant, spec.heads, len(spec.lens), None)
    plan = plan_of(spec, config)
    return np.asarray(paged_decode_sm90(q, kv, tables, plan, params, op=op), np.float32)


def check(spec: DecodeSpec, config: DecodeConfig, races: bool = False) -> None:
    got = attend(spec, config, races)
    want = np.asarray(right_answer(spec, make_decode_problem(spec), spec.dim**-0.5))
    for row, length in enumerate(spec.lens):
        assert np.linalg.norm(got[row] - want[row]) <= 4e-3 * np.linalg.norm(want[row]), row
        if length == 0:
            assert not got[row].any()
        if length == 1:  # the value itself
            np.testing.assert_array_equal(got[row], want[row])


SHARED, LATENTS = SMALL[-2:]  # scores made by both consumers, or by each of them


@pytest.mark.parametrize("spec", SMALL[:-2], ids=lambda spec: spec.name)
def test_kernel_equals_the_oracle(spec: DecodeSpec) -> None:
    check(spec, TINY)


def test_other_tile_sizes_equal_the_oracle() -> None:
    check(SMALL[4], DecodeConfig(256, 512, block=128, stages=3, num_ctas=2, issuers=4))


@pytest.mark.parametrize(
    ("spec", "ctas"),
    [(SMALL[1], 1), (SMALL[9], 1), (SHARED, 2), (LATENTS, 3)],
    ids=lambda value: getattr(value, "name", value),
)
def test_no_race(spec: DecodeSpec, ctas: int, capfd: pytest.CaptureFixture[str]) -> None:
    """One CTA, so that a stage whose tail was cleared is filled again; several, so that each of two
    consumers leaves its half of partial sums."""
    check(spec, dataclasses.replace(TINY, num_ctas=ctas), races=True)
    captured = capfd.readouterr()
    assert "RACE" not in captured.out + captured.err


def test_two_consumers_reduce_across_warps_in_turns() -> None:
    """They share one scratch on a card, which the interpreter does not have: told by the program
    alone, where each such reduction stands between a wait and an arrival."""
    plan, problem = plan_of(LATENTS, TINY), make_decode_problem(LATENTS)
    op = DecodeOp(1.0, LATENTS.window, CAUSAL, TINY, value_dim=LATENTS.value_dim)
    program = jax.make_jaxpr(functools.partial(paged_decode_sm90, op=op))
    found = 0
    for steps in all_steps(program(problem.q, problem.kv, problem.block_tables, plan).jaxpr):
        told = [step for step in steps if "barrier" in step[0] or step in ACROSS_WARPS]
        for i, step in enumerate(told):
            if step in ACROSS_WARPS:
                around = [name for name, _ in told[max(i - 1, 0) : i + 2]]
                assert around == ["barrier_wait", step[0], "barrier_arrive"]
                found += 1
    assert found == 2  # the maximum of a block, the sum of a split


ACROSS_WARPS = [("reduce_max", (0,)), ("reduce_sum", (0,))]  # tokens lie in them


def all_steps(jaxpr: Any) -> Iterator[list[tuple[str, Any]]]:
    """Names and axes of the primitives of a program, and of each program inside it."""
    yield [(step.primitive.name, step.params.get("axes")) for step in jaxpr.eqns]
    for step in jaxpr.eqns:
        for param in jax.tree.leaves(list(step.params.values()), is_leaf=_is_program):
            if _is_program(param):
                yield from all_steps(getattr(param, "jaxpr", param))


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize(("window", "parted"), [(None, 2), (None, 1), (500, 1)])
def test_bits_of_a_row_do_not_depend_on_who_sums_what(window: int | None, parted: int) -> None:
    """One CTA sums the row, or several leave chunks of two splits, or several leave splits."""
    spec = DecodeSpec("", 12, 1, 64, 64, (700, 130), window=window)
    whole, parts = (dataclasses.replace(TINY, num_ctas=n) for n in (1, {2: 3, 1: 9}[parted]))
    assert plan_of(spec, whole).counts[2] == 0
    assert plan_of(spec, parts).counts[1] == parted
    assert plan_of(spec, parts).counts[2] > 0
    np.testing.assert_array_equal(attend(spec, whole), attend(spec, parts))


def test_bits_of_a_row_do_not_depend_on_the_batch() -> None:
    """Nor on the width of the tables."""
    spec = DecodeSpec("", 4, 1, 64, 64, (200, 70))
    full = make_decode_problem(spec)
    alone = dataclasses.replace(spec, lens=(200,), max_pages=11)
    tables = jnp.pad(full.block_tables[:1], ((0, 0), (0, 11 - spec.width)))
    op = DecodeOp(spec.dim**-0.5, None, CAUSAL, TINY, True)
    got = paged_decode_sm90(full.q[:1], full.kv, tables, plan_of(alone, TINY), op=op)
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), attend(spec, TINY)[0])


def test_joining_sums_rounds_each_element_once() -> None:
    """So it cannot matter which products and additions a compiler fuses."""
    rng = np.random.default_rng(0)

    def random_sum(maximum: float) -> Sum:
        values, total = rng.standard_normal((64, 8)), rng.uniform(1, 99, 8)
        maxima = maximum + rng.integers(-9, 9, 8)
        return Sum(*(jnp.asarray(x, jnp.float32) for x in (values, total, maxima)))

    for distance in (0, 12, -12):
        left, right = random_sum(3), random_sum(3 + distance)
        joined = join(left, right)
        top = np.maximum(left.maximum, right.maximum)
        np.testing.assert_array_equal(joined.maximum, top)
        shares = [np.exp2(np.asarray(part.maximum - top, np.float64)) for part in (left, right)]
        for name in ("values", "total"):
            a, b = (np.asarray(getattr(part, name), np.float64) for part in (left, right))
            exact = np.float32(a * shares[0] + b * shares[1])
            np.testing.assert_array_equal(getattr(joined, name), exact)


def test_joining_nothing_changes_nothing() -> None:
    some = Sum(jnp.full((64, 8), -3.7), jnp.full(8, 1.3), jnp.full(8, -200.0))
    nothing = Sum(jnp.zeros((64, 8)), jnp.zeros(8), jnp.full(8, MASKED))
    for joined in (join(nothing, some), join(some, nothing)):
        for got, want in zip(joined, some, strict=True):
            np.testing.assert_array_equal(got, want)
    # A slot that does not exist is read from another one, and only its maximum says so.
    masked = some._replace(maximum=nothing.maximum)
    np.testing.assert_array_equal(join(some, masked).values, some.values)


# The last four of MIXED are to the compiler what some of SMALL are, SPEED what MIXED begins with.
LOWERED = [(spec, "bfloat16", 1) for spec in (*SMALL[:-1], *MIXED[:-4])]


@pytest.mark.parametrize(
    ("spec", "dtype", "issuers"),
    [*LOWERED, (SMALL[1], "float16", 1), (SMALL[4], "bfloat16", 4)],
    ids=lambda value: getattr(value, "name", value),
)
def test_lowers_for_cuda_without_a_gpu(spec: DecodeSpec, dtype: str, issuers: int) -> None:
    config = DecodeConfig(issuers=issuers, stages=2 if spec.value_dim else 3)
    shapes = (
        jax.ShapeDtypeStruct((len(spec.lens), spec.heads, spec.dim), dtype),
        jax.ShapeDtypeStruct(
            (99, spec.parts, spec.kv_heads, spec.page, spec.stored),
            dtype if spec.pages == "bfloat16" else spec.pages,
        ),
        jax.ShapeDtypeStruct((len(spec.lens), spec.width), jnp.int32),
    )
    plan = jax.eval_shape(lambda: plan_of(spec, config))

    @jax.jit
    def two_layers(q: jax.Array, kv: jax.Array, tables: jax.Array, plan: DecodePlan) -> jax.Array:
        for _ in range(2):
            answers = paged_decode(
                q,
                kv,
                tables,
                jnp.zeros(len(spec.lens), jnp.int32),
                scale=0.1,
                platform="sm_90",
                window=spec.window,
                variant=spec.variant,
                config=config,
                plan=plan,
                value_dim=spec.value_dim,
            )
            q = jnp.concatenate([answers, q[..., answers.shape[2] :]], axis=2)
        return q

    text = two_layers.trace(*shapes, plan).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == (2 if plan.num_slots else 1), "once for all layers"
    group = spec.heads // spec.groups
    padded = (group > 8 and group % 8 > 0) or spec.stored > spec.dim
    assert ("stablehlo.pad" in text) == padded, "queries are not copied"


def seen_splits(length: int, window: int | None, size: int) -> set[int]:
    first = 0 if window is None else max(length - window, 0)
    return set(range(first // size, max(length - 1, 0) // size + 1))


@pytest.mark.parametrize(
    ("window", "ctas"),
    [
        *((None, ctas) for ctas in (1, 3, 8, 20, 200)),
        *((1, 1), (1, 200), (130, 3), (130, 20), (300, 1), (300, 8)),
    ],
)
def test_plan_covers_every_split_once_and_bounds_what_is_left(
    window: int | None, ctas: int
) -> None:
    config = dataclasses.replace(TINY, num_ctas=ctas)
    lens = (0, 700, 1, 128, 129, 0, 513, 256, 1400)
    plan = plan_of(DecodeSpec("", 4, 2, 64, 64, lens, window=window), config)
    count, unit, num_split_rows = plan.counts.tolist()
    items, split_rows = np.asarray(plan.items)[:count], np.asarray(plan.split_rows)
    assert count <= len(plan.items)
    assert unit in (1, 2)
    assert num_split_rows <= len(split_rows)
    assert plan.num_slots <= 8 * ctas / 2
    entries = {row: entry for row, *entry in split_rows[:num_split_rows].tolist()}
    slots: list[int] = []
    for row, length in enumerate(lens):
        mine = items[items[:, 0] == row]
        mine = mine[np.argsort(mine[:, 1])]
        walked = [split for _, begin, end, *_ in mine for split in range(begin, end)]
        assert sorted(seen_splits(length, window, 128)) == walked
        assert (mine[:, 4] == length).all()
        assert (len(mine) > 1) == (row in entries)
        if row not in entries:
            assert mine[0, 3] == -1
            continue
        base, first, end = entries[row]
        assert [first, end - 1] == [walked[0] // unit, walked[-1] // unit]
        for _, begin, _, slot, _ in mine:
            assert slot == base + begin // unit - first
            assert begin == walked[0] or begin % unit == 0
        slots += range(base, base + end - first)
    assert slots == list(range(len(slots)))
    assert len(slots) <= plan.num_slots


def test_plan_deals_the_longest_items_first() -> None:
    plan = plan_of(DecodeSpec("", 4, 1, 64, 64, (700, 130, 0, 513, 1400)), TINY)
    items = np.asarray(plan.items)[: int(plan.counts[0])]
    tokens = np.minimum(items[:, 2] * 128, items[:, 4]) - items[:, 1] * 128
    assert (np.diff(tokens) <= 0).all()


@pytest.mark.parametrize(
    ("name", "items", "split_rows"),
    [
        ("B1 x 1024", 4, 1),  # little work: a split each
        ("B64 x 1024", 64, 0),  # enough rows: nothing to combine
        ("B256 x 1024", 256, 0),
        ("B32 x 4096", 32, 0),
        ("B8 x 8192", 32, 8),  # chunks fill the card once
        ("B1 x 65536", 32, 1),
    ],
)
def test_plan_follows_the_work(name: str, items: int, split_rows: int) -> None:
    spec = next(spec for spec in SPEED if spec.name == name)
    plan = plan_of(spec, DecodeConfig())
    assert [int(plan.counts[0]), int(plan.counts[2])] == [items, split_rows]


def test_memory_of_partial_sums_does_not_grow_with_rows_and_their_length() -> None:
    plan = plan_of(DecodeSpec("", 32, 8, 128, 64, (131072,) * 256), DecodeConfig())
    assert plan.num_slots == 264
    assert int(plan.counts[0]) <= len(plan.items) == 256 + 264
    assert plan_of(DecodeSpec("", 32, 8, 128, 64, (256,)), DecodeConfig()).num_slots == 0


def test_refusals_name_the_reason() -> None:
    def reason(
        *shape: int,
        dtype: str = "bfloat16",
        platform: str = "sm_90",
        stages: int = 3,
        pages: str | None = None,
    ) -> str:
        heads, kv_heads, dim, page = shape
        facts = (heads, kv_heads, dim, page, dtype, platform, DecodeConfig(stages=stages))
        return refuses_decode_sm90(*facts, pages) or ""

    assert reason(32, 8, 128, 64) == ""
    assert "sm_90, not cpu" in reason(32, 8, 128, 64, platform="cpu")
    assert "float32" in reason(32, 8, 128, 64, dtype="float32")
    assert "not 96" in reason(32, 8, 96, 64)
    assert "not 8" in reason(32, 8, 128, 8)
    assert "not 65" in reason(65, 1, 128, 64)
    assert reason(8, 1, 256, 128) == ""
    assert "not 33" in reason(33, 1, 256, 64)
    assert reason(32, 8, 128, 64, pages=FP8) == ""
    assert "int8" in reason(32, 8, 128, 64, pages="int8")
    assert "128 channels" in reason(8, 1, 256, 64, pages=FP8)
    assert "shared memory" in reason(8, 1, 256, 64, stages=4)
    assert "shared memory" in reason(32, 8, 128, 64, stages=7)


@pytest.mark.parametrize(
    ("heads", "shape", "refused"),
    [
        (16, (1, 576, 512), ""),
        (128, (1, 576, 512), ""),
        (16, (1, 320, 256), ""),
        (16, (2, 576, 512), "all query heads share"),
        (16, (1, 288, 256), "256 in 288"),
        (16, (1, 640, 512), "up to 576"),
    ],
)
def test_latents_that_are_refused(heads: int, shape: tuple[int, int, int], refused: str) -> None:
    kv_heads, dim, value_dim = shape
    config = DecodeConfig(stages=2)
    facts = (heads, kv_heads, dim, 64, "bfloat16", "sm_90", config)
    reason = refuses_decode_sm90(*facts, value_dim=value_dim)
    assert refused in reason if reason else not refused


def test_latents_have_no_room_for_a_third_stage_and_no_eight_bits() -> None:
    facts = (16, 1, 576, 64, "bfloat16", "sm_90")
    assert "memory" in str(refuses_decode_sm90(*facts, DecodeConfig(stages=3), value_dim=512))
    two = DecodeConfig(stages=2)
    assert "eight bits" in str(refuses_decode_sm90(*facts, two, pages=FP8, value_dim=512))
    assert "per_token" in str(refuses_decode_sm90(*facts, two, numbers=1, value_dim=512))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split_tokens": 100}, "multiple of 128"),
        ({"chunk_tokens": 256 * 3}, "doubled"),
        ({"chunk_tokens": 256}, "doubled"),
        ({"block": 32}, "64 or 128"),
        ({"issuers": 3}, "issuers"),
    ],
)
def test_a_config_that_cannot_run_is_an_error(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**fields)


@pytest.mark.parametrize("spec", [SMALL[2], SMALL[6]], ids=lambda spec: spec.name)
def test_the_api_falls_back_to_xla(spec: DecodeSpec) -> None:
    problem = make_decode_problem(spec)
    got = paged_decode(*problem, scale=0.125, platform="cpu", variant=spec.variant)
    want = np.asarray(right_answer(spec, problem, 0.125))
    error = np.asarray(got, np.float32) - want
    assert np.linalg.norm(error) <= 1e-2 * np.linalg.norm(want)
