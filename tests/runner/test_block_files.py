"""Blocks that come from files give the answers that computing them gives, after a restart too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.engine_core import EngineCore
from jaxllm.kv_files.directory import BlockDirectory
from jaxllm.kv_files.store import BlockStore
from jaxllm.runner.model_runner import ModelRunner
from tests.fakes.tiny_engine import TINY, TinyEngine, request

TEXT = tuple(int(t) for t in np.random.default_rng(4).integers(0, TINY.vocab_size, 100))
REQUESTS = [request(f"r{i}", TEXT[10 * i : 10 * i + 50], 40) for i in range(4)]


def core_on(
    engine: TinyEngine, path: Path, num_blocks: int = 9, ending_s: float = 10.0
) -> EngineCore:
    plan = replace(engine.plan, num_blocks=num_blocks, kv_files=True)
    store = BlockStore(BlockDirectory(path, 2**24), "tiny", ending_s)
    runner = ModelRunner(engine.plan, engine.params, engine.programs, files=store)
    scheduler = Scheduler(plan, cache_key=store._directory.key)
    return EngineCore(scheduler, runner, files=store, keep=runner.keep)


@pytest.mark.parametrize("seconds", [10.0, 0.0])
def test_a_clean_end_writes_what_never_left_the_device(
    engine: TinyEngine, tmp_path: Path, seconds: float
) -> None:
    """One request is still running, with a step in flight."""
    one, other = REQUESTS[:2]
    expected = engine.run([one])[one.request_id].token_ids
    first = core_on(engine, tmp_path, 65, seconds)
    engine.run([one], first)
    first.add_request(other)
    for _ in range(3):
        first.step()
    assert not list(tmp_path.glob("*.kv"))
    first.close()
    second = core_on(engine, tmp_path, 65)
    assert engine.run([one], second)[one.request_id].token_ids == expected
    # 50 tokens of prompt and 40 of answer, blocks of 16; the last one is for computing
    assert second.stats().num_blocks_read == (3 if seconds else 0)
    names = {path.name for path in tmp_path.glob("*.kv")}
    assert len(names) == (5 + 3 if seconds else 0)  # of the other its prompt's
    second.close()


@pytest.mark.parametrize("damage", [False, True])
def test_the_next_engine_finds_what_the_last_one_computed(
    engine: TinyEngine, tmp_path: Path, damage: bool
) -> None:
    expected = {r.request_id: engine.run([r])[r.request_id].token_ids for r in REQUESTS}
    first = core_on(engine, tmp_path)
    answers = engine.run(REQUESTS, first)
    assert {name: answer.token_ids for name, answer in answers.items()} == expected
    first.close()
    files = sorted(tmp_path.glob("*.kv"))
    assert len(files) >= 4
    if damage:
        for path in files:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
    second = core_on(engine, tmp_path)
    answers = engine.run(REQUESTS, second)
    assert {name: answer.token_ids for name, answer in answers.items()} == expected
    stats = second.stats()
    assert (stats.num_blocks_read == 0) == damage
    second.close()


def test_an_engine_whose_steps_fail_goes_on_with_files(engine: TinyEngine, tmp_path: Path) -> None:
    expected = {r.request_id: engine.run([r])[r.request_id].token_ids for r in REQUESTS}
    first = core_on(engine, tmp_path)
    engine.run(REQUESTS, first)
    first.close()
    core = core_on(engine, tmp_path)
    dispatch, failures = core.executor.dispatch, [3, 7]

    def failing(plan: SchedulerOutput) -> Any:
        if plan.step_id in failures:
            raise RuntimeError("injected")
        return dispatch(plan)

    core.executor.dispatch = failing
    answers = engine.run(REQUESTS, core)
    assert {name: answer.token_ids for name, answer in answers.items()} == expected
    core.close()
