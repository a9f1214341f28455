"""Blocks on the host are those that were saved, however long the copies take."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.engine_core import EngineCore
from jaxllm.errors import OutOfMemoryError
from jaxllm.parallel.mesh import DeviceMesh
from jaxllm.runner.host_pool import MOVES_ALIVE, HostPool, lock_memory
from tests.fakes.tiny_engine import TINY, TinyEngine, request

TEXT = tuple(int(t) for t in np.random.default_rng(3).integers(0, TINY.vocab_size, 100))


@jax.jit
def _slowly(block: jax.Array) -> jax.Array:
    """Copied after tens of milliseconds of work. A callback could sleep instead, but JAX calls it
    before it returns."""
    numbers = jnp.full((400, 400), 1e-3 * block[0])
    worked = jax.lax.fori_loop(0, 30, lambda _, x: jnp.tanh(x @ x), numbers)
    return block + 0 * worked.sum()


def _is_ready(array: Any) -> bool:
    return array.is_ready()


class SlowPool(HostPool):
    """Its copies begin at once and end when other steps have long used the blocks."""

    overtaken = 0

    def _to_host(self, blocks: Sequence[jax.Array]) -> list[jax.Array]:
        arriving = [_slowly(block) for block in blocks]
        self.overtaken += not _is_ready(arriving[-1])
        return super()._to_host(arriving)


def test_a_block_is_rewritten_while_its_copy_is_under_way(engine: TinyEngine) -> None:
    """A pool that holds two of three requests, twice: what makes way is loaded again."""
    texts = [TEXT[10 * i : 10 * i + 40] for i in range(3)]
    requests = [request(f"{n}{i}", t, 60) for n in "ab" for i, t in enumerate(texts)]
    expected = {r.request_id: engine.run([r])[r.request_id].token_ids for r in requests[:3]}
    plan = engine.core(num_blocks=9, offloading=True).scheduler.plan
    runner = engine.runner()
    runner._host = pool = SlowPool(runner._keep, DeviceMesh())
    core = EngineCore(Scheduler(plan), runner)
    for batch in (requests[:3], requests[3:]):
        for name, answer in engine.run(batch, core).items():
            assert answer.token_ids == expected["a" + name[1:]]
    assert core.scheduler.kv_cache.num_loaded_blocks > 0
    assert pool.overtaken > 0


def test_a_slot_keeps_the_last_and_files_get_what_they_are_named_for() -> None:
    kept: list[tuple[bytes, jax.Array]] = []
    pool = HostPool(lambda name, block: kept.append((name, block)), DeviceMesh())
    blocks = [jax.device_put(np.full(5, i, np.float32)) for i in range(8)]
    pool.put([3, 4, 3], blocks, [b"old", None, b"new"])
    assert [(name, np.asarray(block)[0]) for name, block in kept] == [(b"old", 0), (b"new", 2)]
    assert [np.asarray(block)[0] for block in pool.get([3, 4])] == [2, 1]
    (block,) = pool.get([3])
    assert block.sharding.memory_kind != pool._contents[3].sharding.memory_kind == "pinned_host"
    pool.fill(4, np.full(5, 9, np.float32))
    assert np.asarray(pool.get([4])[0])[0] == 9


def test_blocks_are_brought_ahead_and_in_order() -> None:
    pool, fetched = HostPool(lambda name, block: None, DeviceMesh()), list[int]()
    for slot in range(4):
        pool.fill(slot, np.full(5, slot, np.float32))

    def parts() -> Iterator[tuple[list[int], np.ndarray]]:
        for slot in (2, 0, 3):
            yield [slot], np.array([10 + slot])
            fetched.append(slot)

    used = [(int(ids[0]), int(np.asarray(found[0])[0]), len(fetched))
            for ids, found in pool.bring(parts())]  # fmt: skip
    assert used == [(12, 2, 1), (10, 0, 2), (13, 3, 3)]
    assert not list(pool.bring([]))


def test_few_blocks_are_on_their_way_at_a_time() -> None:
    """Each is on the device a second time until it has arrived."""
    pool = SlowPool(lambda name, block: None, DeviceMesh())
    for slot in range(2 * MOVES_ALIVE):
        pool.make_room()
        assert sum(not _is_ready(group[-1]) for group in pool._leaving) < MOVES_ALIVE
        pool.put([slot], [jax.device_put(np.full(5, slot, np.float32))], [None])
    slots = range(2 * MOVES_ALIVE)
    assert [np.asarray(block)[0] for block in pool.get(slots)] == list(slots)


def test_a_slot_gives_its_memory_before_it_is_filled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HostPool(lambda name, block: None, DeviceMesh())
    to_host, held = pool._to_host, list[set[int]]()

    def noted(blocks: Any) -> list[jax.Array]:
        held.append(set(pool._contents))
        return to_host(blocks)

    monkeypatch.setattr(pool, "_to_host", noted)
    for value in (1, 2):
        pool.put([3, 5], [jax.device_put(np.full(5, value, np.float32))] * 2, [None] * 2)
    assert held == [set(), set()]
    assert [np.asarray(block)[0] for block in pool.get([3, 5])] == [2, 2]


def test_memory_that_cannot_be_locked_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    block, devices = jax.ShapeDtypeStruct((5,), np.float32), DeviceMesh()
    lock_memory(70, block, devices)

    def refused(*_: Any) -> list[jax.Array]:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: pinned_host")

    monkeypatch.setattr(jax, "device_put", refused)
    with pytest.raises(OutOfMemoryError, match="--swap-space"):
        lock_memory(70, block, devices)
