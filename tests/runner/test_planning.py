"""Plans: every step that can happen has a program, and what cannot work is a typed error."""

from dataclasses import replace
from typing import Any

import pytest

from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import BatchKind, EnginePlan, make_buckets
from jaxllm.core.buckets import pick_bucket, token_budget
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.params import ModelDef, model_def
from jaxllm.runner import planning
from jaxllm.runner.row_layout import MAX_EOS_IDS
from tests.fakes.tiny_engine import TINY

MODEL = model_def(TINY, "float32")  # 256 positions, vocabulary of 96


def make_plan(model: ModelDef = MODEL, **settings: object) -> EnginePlan:
    config = EngineConfig(**{"block_size": 16, **settings})  # pyright: ignore[reportArgumentType]
    return planning.make_plan(config, model, "float32", "xla", "test")


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 17, 256, 300])
@pytest.mark.parametrize("max_tokens", [None, 301, 511, 8192])
def test_every_step_has_a_bucket(platform: str, max_num_seqs: int, max_tokens: int | None) -> None:
    max_tokens = max_tokens or max_num_seqs  # None: the fewest that are allowed
    rows = planning.row_sizes(platform, max_num_seqs)
    buckets = make_buckets(rows, planning.mixed_sizes(platform, rows[-1], max_tokens), rows[-1])
    assert len(set(buckets)) == len(buckets)
    assert all(bucket.num_tokens >= bucket.num_rows for bucket in buckets)
    for count in range(1, max_num_seqs + 1):
        bucket = pick_bucket(buckets, count, count, decode_only=True)
        assert bucket.kind is BatchKind.DECODE
        pick_bucket(buckets, max_tokens, count, decode_only=False)


def test_no_program_of_a_cpu_has_one_row_only() -> None:
    """XLA would convert every bf16 weight to float32 for it."""
    plan = make_plan(max_num_seqs=1, max_num_batched_tokens=1)
    assert {bucket.num_rows for bucket in plan.buckets} == {2}
    assert token_budget(plan) == 1


def test_a_length_between_two_blocks_gets_the_larger_table() -> None:
    plan = make_plan(max_model_len=33, max_num_seqs=3)
    assert plan.max_blocks_per_row == 3
    assert plan.num_blocks == 3 * 3 + 1


def test_a_small_cache_shortens_the_length_nobody_asked_for() -> None:
    assert make_plan(num_gpu_blocks_override=3).max_model_len == 32
    with pytest.raises(OutOfMemoryError, match="--max-model-len 32"):
        make_plan(num_gpu_blocks_override=3, max_model_len=33)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, "--max-num-batched-tokens"),
        ({"max_model_len": 257}, "max_position_embeddings"),
        ({"max_num_seqs": 10**6, "max_num_batched_tokens": 10**6}, "Lower --max-num-seqs"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(**settings)


@pytest.mark.parametrize("eos", [(96,), tuple(range(MAX_EOS_IDS + 1))], ids=["beyond", "many"])
def test_end_of_sequence_ids_must_fit_a_row(eos: tuple[int, ...]) -> None:
    model = replace(MODEL, config=replace(TINY, eos_token_ids=eos))
    with pytest.raises(ConfigError, match="eos_token_id"):
        make_plan(model)


def test_all_end_of_sequence_ids_that_fit() -> None:
    eos = tuple(range(MAX_EOS_IDS))
    model = replace(MODEL, config=replace(TINY, eos_token_ids=eos))
    assert make_plan(model).model.eos_token_ids == eos
