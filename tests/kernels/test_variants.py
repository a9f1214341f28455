"""Every attention variant in the table: reference, plain XLA and the Hopper kernels agree."""

import dataclasses
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.prefill_problem import PrefillProblem
from pallas_kernels.attention.reference import masked_softmax, modified_scores
from pallas_kernels.attention.variant import CAUSAL, AttentionVariant, Param, VariantError
from pallas_kernels.attention.variant_check import (
    SHAPE,
    Case,
    by_kernels,
    by_xla,
    check_answers,
    largest_error,
    lower_for_cuda,
    make_case,
    reference,
    why_not_lowered,
)
from pallas_kernels.attention.variant_functions import check_functions
from pallas_kernels.attention.variants import VARIANTS
from pallas_kernels.attention.variants.t5_bias import by_distance
from pallas_kernels.attention.written_out import written_out
from pallas_kernels.kv_write.narrow import FP8

# Stale NaN keys do reach the scores, where they are masked; the interpreter multiplies in numpy.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")

_T5 = by_distance(np.random.default_rng(0).normal(size=(32, SHAPE.heads)).tolist())
_LATE = 2**31 - 1
# Values with which a variant differs from causal attention in every row; then what rows bring.
VALUES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {}),
    "sliding_window": ({"window": 37}, {}),
    "softcap": ({"cap": 0.7}, {}),
    "alibi": ({}, {}),
    "sinks": ({"sink": [-1.0, 0.5, 2.0, 3.0]}, {}),
    "prefix_lm": ({}, {"prefix_len": [0, 120, 17]}),
    "document_mask": (
        {},
        {"starts": [[70, 100, *[_LATE] * 6], [60, 128, *[_LATE] * 6], [9, *[_LATE] * 7]]},
    ),
    "t5_bias": ({"bias": _T5}, {}),
    "dilated": ({"stride": 3}, {}),
    "block_global": ({"block": 16, "num_global": 5}, {}),
    "head_windows": ({"windows": [5, 33, 64, 90]}, {}),
    "request_bias": ({}, {"bias": [2.0, -3.0, 1.5], "span": [[3, 60], [10, 100], [0, 9]]}),
    "token_bias": ({}, {}),
    "forgetting": ({}, {}),
}
NAMES = tuple(VARIANTS)
# Pages of 32 in blocks of 64: one of which nothing is seen, outside a range or between.
HIDDEN = {"sliding_window": (0, 3), "block_global": (2, 4), "document_mask": (0, 2)}
THREE = tuple(Param(name, "per_token") for name in "abc")


def case_of(name: str, dtype: str = "float32") -> Case:
    values, brought = VALUES[name]
    return make_case(VARIANTS[name].bind(values, SHAPE.heads), brought, dtype=dtype)


def test_every_variant_is_tested() -> None:
    assert set(VALUES) == set(VARIANTS)


@pytest.mark.parametrize("name", NAMES)
def test_xla_equals_the_reference(name: str) -> None:
    case = case_of(name)
    got, want = np.asarray(by_xla(case)), np.asarray(reference(case))
    used = SHAPE.tokens - SHAPE.padding
    np.testing.assert_allclose(got[:used], want[:used], atol=2e-5)
    plain = np.asarray(reference(dataclasses.replace(case, variant=CAUSAL)))
    assert (name == "causal") == np.allclose(want, plain, atol=1e-3), "the values say something"


def test_xla_equals_the_reference_over_pages_of_eight_bits() -> None:
    values, brought = VALUES["request_bias"]
    spec = dataclasses.replace(SHAPE, pages=FP8)
    case = make_case(VARIANTS["request_bias"].bind(values, SHAPE.heads), brought, spec)
    assert largest_error(by_xla(case), reference(case)) < 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name != "causal"])
def test_kernels_equal_the_reference(name: str) -> None:
    case = case_of(name, "bfloat16")
    want = np.asarray(reference(case))
    # Pages that the first row, which decodes, does not see may hold another's NaN.
    hidden = case.problem.block_tables[0, slice(*HIDDEN.get(name, (0, 0)))]
    problem = case.problem._replace(kv=case.problem.kv.at[hidden].set(jnp.nan))
    poisoned = dataclasses.replace(case, problem=problem)
    decoded, prefilled = by_kernels(poisoned, interpret=True)
    decodes, used = SHAPE.decode_rows, SHAPE.tokens - SHAPE.padding
    assert largest_error(decoded[:decodes], want[:decodes]) <= 4e-3
    assert largest_error(prefilled[decodes:used], want[decodes:used]) <= 4e-3


@pytest.mark.parametrize("name", ["alibi", "head_windows"])
def test_kernels_equal_the_reference_over_pages_of_eight_bits(name: str) -> None:
    values, brought = VALUES[name]
    spec = dataclasses.replace(SHAPE, pages=FP8)
    case = make_case(VARIANTS[name].bind(values, SHAPE.heads), brought, spec, "bfloat16")
    want = np.asarray(reference(case))
    decoded, prefilled = by_kernels(case, interpret=True)
    decodes, used = SHAPE.decode_rows, SHAPE.tokens - SHAPE.padding
    assert largest_error(decoded[:decodes], want[:decodes]) <= 4e-3
    assert largest_error(prefilled[decodes:used], want[decodes:used]) <= 4e-3


def bent(s: Any, q: Any, k: Any, h: Any, p: Any) -> Any:
    """What Mosaic has no operation for, or not on tiles; and the head."""
    far = (q - k).astype(jnp.float32)
    s = jnp.where(q % 3 == 0, jax.nn.relu(s), jax.nn.gelu(s, approximate=False))
    s = jnp.where(p.rate > 0.5, s, 0.0) - p.rate ** jnp.floor(far / 41.0) + jnp.log1p(far)
    return s - far * (h.astype(jnp.float32) * 0.05) + p.bias.key


def turned(q: Any, k: Any, h: Any, p: Any) -> Any:
    near = ~(q - k >= (h + 1) * 24)
    return jnp.where(q > 90, near, True) & jnp.where(h < 2, True, k > 3)


BENT = AttentionVariant(
    "bent",
    score_mod=bent,
    mask_mod=turned,
    params=(Param("rate", "per_row", default=0.75), Param("bias", "per_token")),
)


def test_a_mask_is_asked_what_it_hides_unless_it_looks_at_tokens() -> None:
    assert BENT.is_mapped
    numbers = (Param("n", "per_row", size=2, dtype="int32"), Param("bias", "per_token"))
    for mask, is_mapped in (
        (lambda q, k, h, p: q - k < p.n[1], True),
        (lambda q, k, h, p: p.bias.key < p.n[0], False),
        (lambda q, k, h, p: k < 9 if q > k else q == k, False),  # which check_functions refuses
    ):
        assert AttentionVariant("m", mask_mod=mask, params=numbers).is_mapped == is_mapped


def test_a_remainder_stays_on_its_side_of_zero() -> None:
    step = np.full(200, 0.1, np.float32)
    below = np.nextafter(np.arange(1, 201, dtype=np.float32) * step, np.float32(0.0))
    for x in (below, -below):
        got = np.asarray(written_out(jax.lax.rem)(jnp.asarray(x), jnp.asarray(step)))
        assert (got * x >= 0).all() and (np.abs(got) <= step).all()
        turns = (got - np.fmod(x, step)) / step
        np.testing.assert_allclose(turns, np.round(turns), atol=2e-5)


def test_what_kernels_lack_is_written_out() -> None:
    check_functions(BENT)
    case = make_case(BENT, dtype="bfloat16")
    assert why_not_lowered(case) is None
    want = np.asarray(reference(case))
    decoded, prefilled = by_kernels(case, interpret=True)
    decodes, used = SHAPE.decode_rows, SHAPE.tokens - SHAPE.padding
    for head in range(SHAPE.heads):
        assert largest_error(decoded[:decodes, head], want[:decodes, head]) <= 4e-3
        assert largest_error(prefilled[decodes:used, head], want[decodes:used, head]) <= 4e-3


def test_a_row_has_the_same_bits_in_other_company() -> None:
    """The kernels with and without the second row: decode of the first, prefill of the last."""
    case = case_of("alibi", "bfloat16")
    spec = dataclasses.replace(SHAPE, rows=((150, 1), (0, 40)), padding=6)
    fewer = part(case, spec, (0, 2), slice(34, 74), 1)
    q = fewer.problem.q.astype(jnp.bfloat16).at[0].set(case.problem.q[0])
    fewer = dataclasses.replace(fewer, problem=fewer.problem._replace(q=q))
    decoded, prefilled = by_kernels(case, interpret=True)
    alone_decoded, alone_prefilled = by_kernels(fewer, interpret=True)
    np.testing.assert_array_equal(decoded[0], alone_decoded[0])
    np.testing.assert_array_equal(prefilled[34:74], alone_prefilled[1:41])


@pytest.mark.parametrize("name", NAMES)
def test_lowers_for_cuda(name: str) -> None:
    case = case_of(name, "bfloat16")
    assert lower_for_cuda(case).count("mosaic_gpu_v2") == 3  # decode, its combine, prefill


@pytest.mark.parametrize("name", NAMES)
def test_whole_chunked_and_decoded_are_the_same(name: str) -> None:
    """The last row's 40 tokens at once, in two chunks, and the last of them as a decode row."""
    case = case_of(name)
    chunks = dataclasses.replace(SHAPE, rows=((150, 1), (90, 33), (25, 15)), padding=31)
    single = dataclasses.replace(
        SHAPE, rows=((150, 1), (39, 1), (90, 33)), decode_rows=2, padding=45
    )
    whole = np.asarray(by_xla(case))[34:74]
    chunked = np.asarray(by_xla(part(case, chunks, (0, 1, 2), slice(59, 74), 34)))[34:49]
    np.testing.assert_allclose(chunked, whole[25:], atol=2e-5)
    decoded = np.asarray(by_xla(part(case, single, (0, 2, 1), slice(73, 74), 1)))[1]
    np.testing.assert_allclose(decoded, whole[39], atol=2e-5)


def part(case: Case, spec: Any, order: tuple[int, ...], tokens: slice, at: int) -> Case:
    """The same rows in another order and with other tokens of theirs in the step; ``tokens`` of the
    old queries are at ``at`` of the new."""
    problem, slots = case.problem, np.array([*order, 3])
    starts = np.cumsum([0, *(new for _, new in spec.rows), 0])
    q = np.zeros((spec.tokens, spec.heads, spec.dim), np.float32)
    q[at : at + tokens.stop - tokens.start] = problem.q[tokens]
    moved = PrefillProblem(
        jnp.asarray(q),
        problem.kv,
        problem.block_tables[slots],
        jnp.asarray(starts, jnp.int32),
        problem.seq_lens[slots],
        jnp.int32(spec.decode_rows),
    )
    brought = {name: value[slots] for name, value in case.row_params.items()}
    return Case(case.variant, spec, moved, brought, case.token_pages)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_pages_changes_nothing(name: str) -> None:
    case = case_of(name)
    count = case.problem.kv.shape[0]
    order = np.concatenate([[0], np.random.default_rng(3).permutation(count - 1) + 1])
    tables = jnp.asarray(np.argsort(order).astype(np.int32))[case.problem.block_tables]
    moved = case.problem._replace(kv=case.problem.kv[order], block_tables=tables)
    numbers = None if case.token_pages is None else case.token_pages[order]
    got = by_xla(dataclasses.replace(case, problem=moved, token_pages=numbers))
    np.testing.assert_array_equal(got, by_xla(case))


def score(function: Any, *params: Param) -> AttentionVariant:
    return AttentionVariant("mine", score_mod=function, params=params)


def test_keys_that_causality_hides_leave_gradients_finite() -> None:
    def fade(s: Any, q: Any, k: Any, h: Any, p: Any) -> Any:
        return s - p.rate * jnp.log((q - k + 1).astype(jnp.float32))

    faded = score(fade, Param("rate", "per_layer"))
    positions = jnp.arange(4, dtype=jnp.int32)

    def loss(rate: Any) -> Any:
        given = (jnp.zeros((4, 1, 4)), jnp.zeros(4, jnp.int32), positions, faded, {"rate": rate})
        scores, visible = modified_scores(*given)
        return jnp.sum(masked_softmax(scores, visible, None) ** 2)

    assert float(jax.grad(loss)(jnp.float32(0.5))) > 0.1


def test_what_does_not_lower_is_named_with_what_to_use() -> None:
    table = jnp.arange(8.0)
    for function, word in (
        (lambda s, q, k, h, p: jnp.arctan(s), "atan does not lower.* per_distance"),
        (lambda s, q, k, h, p: jnp.select([q > k], [s], 0.0), "argmax .* nest jnp.where"),
        (lambda s, q, k, h, p: jax.lax.fori_loop(0, 3, lambda i, x: x * 0.5, s), "in Python"),
        (lambda s, q, k, h, p: s + jnp.arange(8.0)[k % 8], "Param"),
    ):
        reason = why_not_lowered(make_case(score(function), dtype="bfloat16"))
        assert re.search(word, str(reason)), reason
    with pytest.raises(VariantError, match="array 'table' from outside"):
        score(lambda s, q, k, h, p: s + table[0])
    half = jnp.float32(0.5)
    with pytest.raises(VariantError, match=r"as Python does, half = 0\.5"):
        score(lambda s, q, k, h, p: s * half)


def test_functions_that_give_something_else_are_refused() -> None:
    check_functions(VARIANTS["t5_bias"])
    for function, message in (
        (lambda s, q, k, h, p: s > 0, "score_mod must give a float32"),
        (lambda s, q, k, h, p: s[..., None], "score_mod must give a float32"),
        (lambda s, q, k, h, p: s * p.slope, "score_mod cannot be traced"),
        (lambda s, q, k, h, p: s - jnp.cumsum(s, axis=-1), "cumsum mixes pairs"),
        (lambda s, q, k, h, p: jax.nn.softmax(s), "reduce_max mixes pairs"),
        (lambda s, q, k, h, p: jax.lax.cumlogsumexp(s, s.ndim - 1), "cumlogsumexp mixes pairs"),
        (lambda s, q, k, h, p: s + jnp.flip(s), "rev mixes pairs"),
        (lambda s, q, k, h, p: s - jnp.roll(s, 1, axis=-1), "slice mixes pairs"),
        (lambda s, q, k, h, p: s if q > k else 2 * s, "use jnp.where"),
        (lambda s, q, k, h, p: s - float(k), "use jax.numpy"),
        (lambda s, q, k, h, p: None, "must return what it computes"),
        (lambda s, q, k, h, p: s.astype(jnp.bfloat16), "must give a float32 .* not bfloat16"),
        (lambda s, q, k, h, p: 1.0, "give an array"),
    ):
        with pytest.raises(VariantError, match=message):
            check_functions(score(function))
    with pytest.raises(VariantError, match="mask_mod must give a bool"):
        check_functions(AttentionVariant("mine", mask_mod=lambda q, k, h, p: q - k))
    sized = (Param("both", "per_row", size=2),)
    with pytest.raises(VariantError, match=r"a per_row param with a size .* params.NAME\[0\]"):
        check_functions(AttentionVariant("mine", lambda s, q, k, h, p: s * p.both, params=sized))
    with pytest.raises(VariantError, match="no attribute 'bot'; params of mine: both"):
        check_functions(AttentionVariant("mine", lambda s, q, k, h, p: s * p.bot, params=sized))


def test_a_range_that_is_none_is_refused_by_name() -> None:
    wide = (Param("wide", "per_head", default=9.0, dtype="int32"),)
    for function, message in (
        (lambda first, last, p: (first - p.wide, last), r"kv_range .* take its .max\(\)"),
        (lambda first, last, p: first - p.wide.max(), "kv_range must give two positions"),
        (
            lambda first, last, p: (first.astype(jnp.float32), last),
            "kv_range must give two whole numbers",
        ),
        (lambda first, last, p: (first if first > 3 else 0, last), "kv_range cannot be traced"),
    ):
        with pytest.raises(VariantError, match=message):
            check_functions(AttentionVariant("mine", kv_range=function, params=wide))
    check_functions(
        AttentionVariant("mine", kv_range=lambda a, b, p: (a - p.wide.max(), b), params=wide)
    )


def test_a_score_may_hide_a_pair_and_all_of_a_query_s() -> None:
    check_answers(score(lambda s, q, k, h, p: jnp.where((q - k) % 3 == 1, -jnp.inf, s)))
    check_answers(score(lambda s, q, k, h, p: jnp.where(q % 5 == 1, -jnp.inf, s)))


def test_scores_that_are_no_numbers_are_refused() -> None:
    steep = score(lambda s, q, k, h, p: s - jnp.log((q - k).astype(jnp.float32)))
    with pytest.raises(VariantError, match=r"makes inf of a score of 0\.5, for query 0 and key 0"):
        check_answers(steep)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Param("a b", "per_head"), "no name"),
        (lambda: Param("a", cast(Any, "per_page")), "kind"),
        (lambda: Param("a", "per_distance"), "needs its size"),
        (lambda: Param("a", "per_head", size=3), "takes no size"),
        (lambda: Param("a", "per_token", dtype="int32"), "float32 only"),
        (lambda: AttentionVariant("v", params=THREE), "at most 2"),
        (lambda: AttentionVariant("v", params=cast(Any, THREE[0])), "must be a tuple"),
        (lambda: AttentionVariant("v", sinks="a"), "sinks"),
        (lambda: AttentionVariant("v", mask_mod=cast(Any, lambda q: q)), "4 arguments"),
        (lambda: AttentionVariant("v", lookahead="n"), "lookahead without mask_mod"),
        (
            lambda: AttentionVariant("v", mask_mod=lambda q, k, h, p: q < k, lookahead="n"),
            "lookahead must name a per_row",
        ),
        (lambda: VARIANTS["alibi"].bind({"slope": 1}), "no param 'slope'; it has: slopes"),
        (lambda: VARIANTS["alibi"].bind({"slopes": [1.0, 2.0]}, 4), r"shape \[4\]"),
        (lambda: VARIANTS["dilated"].bind({"stride": 1.5}, 4), "whole numbers"),
        (lambda: VARIANTS["softcap"].bind({"cap": float("nan")}, 4), "out of range"),
        (lambda: VARIANTS["softcap"].bind({"cap": "much"}, 4), "numbers"),
    ],
)
def test_wrong_declarations_and_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(VariantError, match=message):
        make()


def test_layers_with_other_values_share_their_kernels() -> None:
    case = case_of("alibi", "bfloat16")

    def two(problem: PrefillProblem) -> list[Any]:
        return [
            by_kernels(
                dataclasses.replace(
                    case, problem=problem, variant=case.variant.bind({"slopes": slope})
                ),
                interpret=False,
            )
            for slope in (0.1, 0.2)
        ]

    text = jax.jit(two).trace(case.problem).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3
