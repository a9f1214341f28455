"""Sizes are decided before anything is compiled, so the estimate must not be below the truth."""

from dataclasses import replace

import pytest

from jaxllm.attention.backends.xla import BACKEND
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import make_buckets
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.params import model_def
from jaxllm.runner import memory
from jaxllm.runner.planning import mixed_sizes, row_sizes
from jaxllm.runner.programs import Programs
from jaxllm.runner.row_layout import RowLayout, row_buffers_spec
from tests.fakes.tiny_engine import TINY, tiny_plan

BLOCK_BYTES = 2 * 2 * 2 * 16 * 8 * 4  # two layers, keys and values, two heads


def blocks(monkeypatch: pytest.MonkeyPatch, free: int | None, wanted: int = 100, **settings: int):
    monkeypatch.setattr(memory, "_free_bytes", lambda other_bytes: free)
    config = EngineConfig(block_size=16, **settings)  # pyright: ignore[reportArgumentType]
    return memory.num_blocks(config, TINY, "float32", other_bytes=0, wanted=wanted)


def test_takes_what_is_wanted_and_no_more_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(monkeypatch, 10**9) == 100
    assert blocks(monkeypatch, 20 * BLOCK_BYTES) == 10  # half of a CPU's free memory
    assert blocks(monkeypatch, 10**9, kv_cache_memory_bytes=7 * BLOCK_BYTES + 1) == 7
    assert blocks(monkeypatch, 10**9, num_gpu_blocks_override=200) == 200


@pytest.mark.parametrize(
    ("free", "settings"),
    [
        (-1, {}),
        (3 * BLOCK_BYTES, {}),
        (10**9, {"kv_cache_memory_bytes": 2 * BLOCK_BYTES - 1}),
        (10**9, {"num_gpu_blocks_override": 1}),
        (10**9, {"num_gpu_blocks_override": 10**9}),
        (50 * BLOCK_BYTES, {"kv_cache_memory_bytes": 60 * BLOCK_BYTES}),
        (-1, {"kv_cache_memory_bytes": 60 * BLOCK_BYTES}),
    ],
)
def test_too_little_memory_is_said_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, free: int, settings: dict[str, int]
) -> None:
    with pytest.raises(OutOfMemoryError, match="GiB"):
        blocks(monkeypatch, free, **settings)


def test_a_device_that_does_not_tell_needs_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(monkeypatch, None, kv_cache_memory_bytes=9 * BLOCK_BYTES) == 9
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes"):
        blocks(monkeypatch, None)


@pytest.mark.parametrize("name", ["kv_cache_memory_bytes", "num_gpu_blocks_override"])
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        EngineConfig(**{name: 0})  # pyright: ignore[reportArgumentType]


def test_row_buffers_are_counted_in_full() -> None:
    layout = RowLayout(40)
    spec = row_buffers_spec(layout, 7, TINY.vocab_size)
    arrays = (spec.state, spec.output_counts, spec.prompt_seen)
    real = sum(array.size * array.dtype.itemsize for array in arrays)
    assert memory.row_buffer_bytes(TINY, 7, layout.width) == real


def test_scratch_of_the_real_programs_is_below_the_estimate() -> None:
    """One sequence at a time, in bf16: the shape whose temporaries are easiest to underrate."""
    config = replace(TINY, vocab_size=8192, num_layers=1, sliding_windows=())
    rows = row_sizes("cpu", 1)
    buckets = make_buckets((), mixed_sizes("cpu", rows[-1], 64), rows[-1])
    plan = tiny_plan(model=config, dtype="bfloat16", max_num_seqs=1, buckets=buckets)
    programs = Programs(plan, model_def(config, "bfloat16"), BACKEND)
    programs.compile(threads=2, progress=False)
    assert programs.temp_bytes() <= memory.scratch_bytes(config, 64, rows[-1], 2)
