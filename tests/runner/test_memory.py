"""What is counted is what is taken; what is estimated is never below it."""

from dataclasses import replace
from typing import Any

import jax
import pytest

from jaxllm.attention.backends.xla import BACKEND
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import make_buckets
from jaxllm.errors import ConfigError, OutOfMemoryError
from jaxllm.models.params import model_def
from jaxllm.runner.memory import (
    GPU_RESERVE_BYTES,
    MEASURED,
    NO_WORK,
    WORKSPACE_BYTES,
    Device,
    MemoryPlan,
    ProgramMemory,
    WorkingMemory,
    estimated_memory,
    memory_plan,
    num_blocks,
)
from jaxllm.runner.planning import mixed_sizes, row_sizes
from jaxllm.runner.programs import Programs
from tests.fakes.tiny_engine import TINY, TinyEngine, tiny_plan

BLOCK_BYTES = 2 * 2 * 2 * 16 * 8 * 4  # two layers, keys and values, two heads


def blocks(free: int | None, platform: str = "cpu", **settings: Any) -> int:
    config = EngineConfig(block_size=16, **settings)
    limit = None if free is None else free + Device(platform, None).reserve
    memory = MemoryPlan(Device(platform, limit), 0, 0, NO_WORK, BLOCK_BYTES)
    return num_blocks(config, memory, wanted=100)


def test_takes_what_is_wanted_and_no_more_than_allowed() -> None:
    assert blocks(10**9) == 100
    assert blocks(20 * BLOCK_BYTES) == 10  # half of a CPU's free memory
    assert blocks(20 * BLOCK_BYTES, "gpu") == 20
    assert blocks(21 * BLOCK_BYTES - 1, "gpu") == 20
    assert blocks(10**9, kv_cache_memory_bytes=7 * BLOCK_BYTES + 1) == 7
    assert blocks(10**9, num_gpu_blocks_override=200) == 200


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
def test_too_little_memory_is_said_before_it_is_taken(free: int, settings: dict[str, Any]) -> None:
    with pytest.raises(OutOfMemoryError, match="GiB"):
        blocks(free, **settings)


def test_a_device_that_does_not_tell_needs_a_number() -> None:
    assert blocks(None, "gpu", kv_cache_memory_bytes=9 * BLOCK_BYTES) == 9
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes"):
        blocks(None, "gpu")


@pytest.mark.parametrize("name", ["kv_cache_memory_bytes", "num_gpu_blocks_override"])
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        EngineConfig(**{name: 0})  # pyright: ignore[reportArgumentType]


def test_what_stays_on_the_device_is_counted_to_the_byte(engine: TinyEngine) -> None:
    memory = memory_plan(engine.plan, engine.model, Device("gpu", 10**9), NO_WORK)
    runner = engine.runner()
    assert memory.weights == sum(leaf.nbytes for leaf in engine.params)
    kept = jax.tree.leaves((runner._buffers, runner._no_mask))
    assert memory.rows == sum(leaf.nbytes for leaf in kept)
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(runner._kv))
    assert memory.block * engine.plan.num_blocks == cache
    assert memory.free == 10**9 - memory.weights - memory.rows - GPU_RESERVE_BYTES


def test_working_memory_is_the_worst_program_and_the_outputs_of_two_steps() -> None:
    programs = (
        ProgramMemory("forward", "small", 10, 3),
        ProgramMemory("sample", "rows", 70, 5),
        ProgramMemory("forward", "large", 60, 100),
    )
    working = WorkingMemory(programs, MEASURED)
    assert working.worst.name == "sample rows"
    assert working.total == 70 + 2 * (100 + 5)
    assert NO_WORK.total == 0


def test_estimates_of_all_programs_are_above_the_real_ones() -> None:
    """One sequence at a time, in bf16: the shape whose temporaries are easiest to underrate. Even
    without the room for what is small."""
    config = replace(TINY, vocab_size=8192, num_layers=1, sliding_windows=())
    rows = row_sizes("cpu", 1)
    buckets = make_buckets((), mixed_sizes("cpu", rows[-1], 64), rows[-1])
    plan = tiny_plan(model=config, dtype="bfloat16", max_num_seqs=1, buckets=buckets)
    programs = Programs(plan, model_def(config, "bfloat16"), BACKEND)
    programs.compile(threads=2, progress=False)
    estimated = {program.name: program for program in estimated_memory(plan).programs}
    real = {program.name: program for program in programs.working_memory().programs}
    assert {name for name in real if not name.startswith("sample")} < set(estimated) <= set(real)
    for name, estimate in estimated.items():
        assert 0 < real[name].temporary_bytes <= estimate.temporary_bytes - WORKSPACE_BYTES
        # A CPU adds a pointer for every output.
        assert real[name].output_bytes <= estimate.output_bytes + 256
    assert programs.working_memory().total <= estimated_memory(plan).total


def test_temporaries_do_not_depend_on_the_number_of_blocks(engine: TinyEngine) -> None:
    """What measuring before that number is known relies on."""
    likely = tiny_plan(num_blocks=999, buckets=make_buckets((8,), (32, 64), 8))
    other = Programs(likely, engine.model, BACKEND)
    measured = {program.name: program for program in other.measure(threads=2).programs}
    whole = engine.programs.working_memory()
    assert measured.keys() < {program.name for program in whole.programs}
    assert whole.worst.name in measured
    for program in whole.programs:
        assert program == measured.get(program.name, program)
    other.settle(likely)
    assert len(other) == len(measured)
    other.settle(replace(likely, num_blocks=1000))  # programs of another number must not run
    kinds = {program.kind for program in other.working_memory().programs}
    assert kinds == {"sample", "score", "recount"}
