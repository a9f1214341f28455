from dataclasses import replace

import pytest

from jaxllm.config.plan import BatchBucket, BatchKind, make_buckets
from jaxllm.core.buckets import pick_bucket, token_budget, tokens_to_feed
from jaxllm.errors import ConfigError, RecompilationError
from tests.fakes.plans import make_plan

BUCKETS = make_buckets((2, 4, 8), (16, 64), 8)


@pytest.mark.parametrize(
    ("tokens", "rows", "decode_only", "expected"),
    [
        (1, 1, True, BatchBucket(2, 2, BatchKind.DECODE)),
        (2, 2, True, BatchBucket(2, 2, BatchKind.DECODE)),
        (3, 3, True, BatchBucket(4, 4, BatchKind.DECODE)),
        (2, 1, False, BatchBucket(16, 8, BatchKind.MIXED)),
        (16, 8, False, BatchBucket(16, 8, BatchKind.MIXED)),
        (17, 2, False, BatchBucket(64, 8, BatchKind.MIXED)),
    ],
)
def test_smallest_that_fits(tokens: int, rows: int, decode_only: bool, expected: BatchBucket):
    assert pick_bucket(BUCKETS, tokens, rows, decode_only) == expected
    assert pick_bucket(reversed(BUCKETS), tokens, rows, decode_only) == expected


def test_decode_falls_back_to_mixed():
    buckets = make_buckets((2,), (16,), 8)
    assert pick_bucket(buckets, 5, 5, True).kind is BatchKind.MIXED


@pytest.mark.parametrize(("tokens", "rows"), [(65, 1), (20, 9)])
def test_error_names_the_shape(tokens: int, rows: int):
    with pytest.raises(RecompilationError, match=rf"{tokens} tokens, {rows} rows"):
        pick_bucket(BUCKETS, tokens, rows, False)


@pytest.mark.parametrize(
    ("tokens", "decoding", "fed"),
    [
        (16, 4, 16),  # fills a program
        (20, 4, 16),  # 44 of 64 tokens would be padding
        (51, 4, 16),
        (52, 4, 52),  # padding is a quarter
        (60, 4, 60),
        (10, 4, 10),  # no smaller program
        (45, 15, 45),  # the smaller one would feed one token of thirty
        (18, 15, 16),
        (20, 20, 20),  # nothing to prefill
    ],
)
def test_a_step_fills_a_program_rather_than_pads_one(tokens: int, decoding: int, fed: int):
    assert tokens_to_feed(BUCKETS, tokens, decoding) == fed


def test_budget_is_what_a_compiled_program_holds():
    plan = make_plan(max_num_batched_tokens=16)
    assert token_budget(plan) == 16
    assert token_budget(replace(plan, max_num_batched_tokens=999)) == 16
    assert token_budget(replace(plan, max_num_batched_tokens=10)) == 10


def test_a_plan_that_cannot_serve_its_rows_is_refused():
    with pytest.raises(ConfigError, match="max-num-seqs"):
        token_budget(replace(make_plan(max_num_seqs=4), buckets=make_buckets((4,), (16,), 2)))
    with pytest.raises(ConfigError, match="max-num-batched-tokens"):
        token_budget(make_plan(max_num_seqs=32, max_num_batched_tokens=16))
