"""Plans: every step that can happen has a program, and what cannot work is a typed error."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxllm.attention.kv_cache import bytes_per_block
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import BatchKind, EnginePlan, make_buckets
from jaxllm.core.buckets import pick_bucket, token_budget
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.models.params import ModelDef, model_def
from jaxllm.runner import planning
from jaxllm.runner.block_moves import BLOCKS_PER_MOVE
from jaxllm.runner.memory import (
    GIB,
    MEASURED,
    NO_WORK,
    Device,
    ProgramMemory,
    WorkingMemory,
    estimated_memory,
    memory_plan,
)
from jaxllm.runner.row_layout import MAX_EOS_IDS
from jaxllm.weights.json_file import read_json_object
from tests.fakes.tiny_engine import TINY

MODEL = model_def(TINY, "float32")  # 256 positions, vocabulary of 96


def make_config(**settings: object) -> EngineConfig:
    return EngineConfig(**{"block_size": 16, **settings})  # pyright: ignore[reportArgumentType]


def make_draft(config: EngineConfig, model: ModelDef = MODEL, platform: str = "cpu") -> EnginePlan:
    return planning.draft_plan(config, model, "float32", platform, ("xla", "test"))


def make_plan(model: ModelDef = MODEL, **settings: object) -> EnginePlan:
    config = make_config(**settings)
    draft = make_draft(config, model)
    memory = memory_plan(draft, model, Device("cpu", 10**10), estimated_memory(draft))
    return planning.fit_plan(config, draft, memory)


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


@pytest.mark.parametrize("max_num_seqs", [1, 64, 128, 129, 256])
def test_a_target_for_latency_has_one_smaller_mixed_program(max_num_seqs: int) -> None:
    config = make_config(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192)
    held = replace(config, target_itl_ms=9.0)
    free, more = (
        planning.draft_plan(c, MODEL, "float32", "gpu", ("xla", "test")) for c in (config, held)
    )
    (small,) = set(more.buckets) - set(free.buckets)
    assert small.num_tokens == 128 == max(128, small.num_rows)
    assert small.num_rows in {b.num_rows for b in free.buckets}  # there is a sampler
    for rows in range(1, small.num_rows + 1):
        assert pick_bucket(more.buckets, 128, rows, decode_only=False) == small
    narrow = replace(held, max_num_seqs=1, max_num_batched_tokens=128)
    plan = planning.draft_plan(narrow, MODEL, "float32", "gpu", ("xla", "test"))
    assert len(set(plan.buckets)) == len(plan.buckets) == 2


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
        ({"swap_space": 2.0**19}, "this host has"),
        ({"swap_space": 1.0, "enable_prefix_caching": False}, "--swap-space keeps"),
        ({"kv_offloading_size": 1.0, "enable_prefix_caching": False}, "--kv-offloading-size"),
        ({"kv_offloading_dir": "d", "enable_prefix_caching": False}, "--kv-offloading-dir keeps"),
        ({"kv_offloading_dir": "d", "kv_offloading_dir_size": 0.0}, "more than 0"),
        ({"kv_offloading_dir_timeout": -1.0}, "at least 0"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(**settings)


def test_swapping_and_offloading_share_the_hosts_memory() -> None:
    one, both = make_plan(swap_space=0.25), make_plan(swap_space=0.25, kv_offloading_size=0.5)
    assert one.host_blocks == GIB // 4 // bytes_per_block(TINY, 16, "float32") > 0
    assert abs(both.host_blocks - 3 * one.host_blocks) <= 2
    assert (one.offloading, both.offloading) == (False, True)
    assert make_plan().host_blocks == make_plan(swap_space=0.0).host_blocks == 0
    staged = make_plan(kv_offloading_dir="kv")
    assert staged.kv_files and staged.host_blocks == 4 * one.host_blocks


@pytest.mark.parametrize(
    ("platform", "limit", "gib"),
    [("gpu", "max", 4), ("gpu", f"{32 * GIB}", 0), ("cpu", "max", 0)],
)
def test_blocks_are_swapped_where_that_is_faster_and_the_host_has_room(
    platform: str, limit: str, gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = read_json_object(Path("configs/models/llama-3.1-8b/config.json"))
    model = model_def(LlamaForCausalLM.config_from_hf(hf), "bfloat16")
    container = tmp_path / "memory.max"
    container.write_text(f"{limit}\n")
    monkeypatch.setattr(planning, "_CGROUP_LIMIT", container)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: Namespace(total=128 * GIB))
    config = EngineConfig(model="m")
    plan = planning.draft_plan(config, model, "bfloat16", platform, ("xla", "test"))
    assert plan.host_blocks == gib * GIB // bytes_per_block(model.config, 64, "bfloat16")


def test_eight_bits_hold_twice_the_tokens_of_sixteen() -> None:
    model = model_def(TINY, "bfloat16")
    drafts = [
        planning.draft_plan(
            make_config(kv_cache_dtype=dtype, kv_cache_memory_bytes=2**17, swap_space=0.25),
            model,
            "bfloat16",
            "cpu",
            ("xla", "test"),
        )
        for dtype in ("auto", "fp8", "fp8_e4m3")
    ]
    memories = [memory_plan(d, model, Device("cpu", 10**10), estimated_memory(d)) for d in drafts]
    config = make_config(kv_cache_memory_bytes=2**17)
    blocks = [
        planning.fit_plan(config, draft, memory).num_blocks
        for draft, memory in zip(drafts, memories, strict=True)
    ]
    assert blocks == [blocks[0], 2 * blocks[0], 2 * blocks[0]]
    assert drafts[1].host_blocks == 2 * drafts[0].host_blocks > 0
    assert [draft.page_dtype for draft in drafts] == ["bfloat16", *["float8_e4m3fn"] * 2]
    with pytest.raises(ConfigError, match="--kv-cache-dtype must be one of auto, fp8, fp8_e4m3"):
        make_config(kv_cache_dtype="int4")


def test_padded_heads_are_counted() -> None:
    """In the cache, what moves of it, and what the host's memory holds."""
    config = make_config(swap_space=0.25)
    own, padded = (
        planning.draft_plan(config, MODEL, "float32", "cpu", ("xla", "test"), head_dims)
        for head_dims in ((), (4 * TINY.head_dim,) * TINY.num_layers)
    )
    one, four = (memory_plan(plan, MODEL, Device("cpu", None), NO_WORK) for plan in (own, padded))
    assert four.block == 4 * one.block
    assert padded.host_blocks == GIB // 4 // four.block
    moved, more = (
        next(p.temporary_bytes for p in estimated_memory(plan).programs if p.kind == "copy")
        for plan in (own, padded)
    )
    assert more - moved == (BLOCKS_PER_MOVE + 1) * (four.block - one.block)


@pytest.mark.parametrize("eos", [(96,), tuple(range(MAX_EOS_IDS + 1))], ids=["beyond", "many"])
def test_end_of_sequence_ids_must_fit_a_row(eos: tuple[int, ...]) -> None:
    model = replace(MODEL, config=replace(TINY, eos_token_ids=eos))
    with pytest.raises(ConfigError, match="eos_token_id"):
        make_plan(model)


def test_all_end_of_sequence_ids_that_fit() -> None:
    eos = tuple(range(MAX_EOS_IDS))
    model = replace(MODEL, config=replace(TINY, eos_token_ids=eos))
    assert make_plan(model).model.eos_token_ids == eos


def gpu_for(draft: EnginePlan, blocks: int, working: WorkingMemory) -> Device:
    """One that has room for exactly so many blocks beside ``working``."""
    memory = memory_plan(draft, MODEL, Device("gpu", 0), working)
    return Device("gpu", memory.beside_cache + blocks * memory.block)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({}, True),  # the estimate would cost blocks
        ({"num_gpu_blocks_override": 50}, False),  # room for these beside the estimate too
        ({"num_gpu_blocks_override": 51}, True),
        ({"max_num_seqs": 3}, False),  # 3 rows of 16 blocks and the null block fit
        ({"max_num_seqs": 4}, True),
    ],
)
def test_a_gpu_is_measured_where_an_estimate_would_cost_blocks(
    settings: dict[str, Any], measured: bool
) -> None:
    config = make_config(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **settings})
    draft = make_draft(config, platform="gpu")
    device = gpu_for(draft, 50, estimated_memory(draft))
    assert planning.needs_measuring(config, draft, MODEL, device) is measured
    on_cpu = Device("cpu", device.limit)
    assert not planning.needs_measuring(config, draft, MODEL, on_cpu)


def test_what_can_never_fit_is_refused_before_anything_is_measured() -> None:
    config = make_config(max_num_seqs=2, max_model_len=200)
    draft = make_draft(config, platform="gpu")
    for blocks, message in ((1, "leaves"), (5, "--max-model-len 64")):
        device = gpu_for(draft, blocks, NO_WORK)
        with pytest.raises(OutOfMemoryError, match=message):
            planning.needs_measuring(config, draft, MODEL, device)


def test_every_byte_that_is_left_becomes_cache() -> None:
    config = make_config(max_num_seqs=8)
    draft = make_draft(config, platform="gpu")
    working = WorkingMemory((ProgramMemory("forward", "x", 10**6, 10**5),), MEASURED)
    exact = gpu_for(draft, 70, working)
    for limit, blocks in ((exact.limit, 70), ((exact.limit or 0) - 1, 69)):
        memory = memory_plan(draft, MODEL, Device("gpu", limit), working)
        plan = planning.fit_plan(config, draft, memory)
        assert plan.num_blocks == blocks
        assert plan.kv_tokens == (blocks - 1) * 16
        assert plan.max_concurrency(17) == (blocks - 1) / 2


def test_programs_that_need_more_than_was_set_aside_are_named() -> None:
    config = make_config(max_num_seqs=8)
    draft = make_draft(config, platform="gpu")
    worst = ProgramMemory("forward", "mixed[9 tokens, 8 rows]", 10**6, 0)
    planned = WorkingMemory((worst,), MEASURED)
    memory = memory_plan(draft, MODEL, gpu_for(draft, 70, planned), planned)
    plan = planning.fit_plan(config, draft, memory)
    planning.check_plan(plan, memory, planned)
    more = replace(worst, shape="decode[8 tokens, 8 rows]", temporary_bytes=10**6 + 1)
    with pytest.raises(OutOfMemoryError, match=r"forward decode\[8 tokens.*override 69"):
        planning.check_plan(plan, memory, WorkingMemory((worst, more), MEASURED))
