"""BlockPool and KVCacheManager against a model of plain lists, in any order of calls."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from jaxllm.core.block_pool import NULL_BLOCK, BlockPool
from jaxllm.core.invariant import InvariantError
from jaxllm.core.kv_cache_manager import KVCacheManager
from jaxllm.core.request import Request
from tests.fakes.plans import make_request

MAX_MODEL_LEN = 24


class Allocator(RuleBasedStateMachine):
    """The model: blocks that are free, first freed first, and a list of blocks per request."""

    holders = Bundle("holders")

    @initialize(num_blocks=st.integers(2, 20), block_size=st.sampled_from((1, 2, 4, 8)))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.cache = KVCacheManager(self.pool, block_size, MAX_MODEL_LEN)
        self.block_size = block_size
        self.free = list(range(1, num_blocks))
        self.tables: dict[str, list[int]] = {}
        self.num_requests = 0

    @rule(target=holders)
    def come(self) -> Request:
        self.num_requests += 1
        core_request = make_request(f"r{self.num_requests}", 1)
        return Request(core_request, self.num_requests, MAX_MODEL_LEN)

    @rule(request=holders, num_tokens=st.integers(0, MAX_MODEL_LEN))
    def grow(self, request: Request, num_tokens: int) -> None:
        table = self.tables.get(request.request_id, [])
        missing = max(0, -(-num_tokens // self.block_size) - len(table))
        appended = self.cache.allocate_slots(request, num_tokens)
        if missing > len(self.free):
            assert appended is None
            return
        taken = [self.free.pop(0) for _ in range(missing)]
        assert appended == tuple(enumerate(taken, len(table)))
        self.tables[request.request_id] = table + taken

    @rule(request=holders)
    def grow_beyond_the_longest(self, request: Request) -> None:
        with pytest.raises(InvariantError):
            self.cache.allocate_slots(request, self.cache.max_blocks_per_request * 8 + 1)

    @rule(request=consumes(holders))
    def leave(self, request: Request) -> None:
        table = self.tables.pop(request.request_id, None)
        if table is None:
            with pytest.raises(InvariantError):
                self.cache.free(request)
            return
        self.cache.free(request)
        self.free += table

    @rule(block_id=st.integers(-2, 22))
    def free_what_nobody_owns(self, block_id: int) -> None:
        if not any(block_id in table for table in self.tables.values()):
            with pytest.raises(InvariantError):
                self.pool.free([block_id])

    @rule(n=st.integers(-3, 25))
    def allocate_and_free(self, n: int) -> None:
        if n < 0:
            with pytest.raises(InvariantError):
                self.pool.allocate(n)
            return
        ids = self.pool.allocate(n)
        assert ids == (self.free[:n] if n <= len(self.free) else None)
        if ids is not None:
            self.pool.free(ids)
            self.free = self.free[n:] + ids

    @rule(num_tokens=st.integers(0, 200))
    def ask_what_fits(self, num_tokens: int) -> None:
        needed = -(-num_tokens // self.block_size)
        assert self.cache.can_ever_hold(num_tokens) == (needed <= self.pool.num_blocks - 1)

    @invariant()
    def same_books(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert list(self.pool.free_blocks()) == self.free
        assert self.pool.num_free == len(self.free)
        assert self.pool.usage == pytest.approx(1 - len(self.free) / self.pool.num_usable)
        assert self.cache.tables() == {name: tuple(t) for name, t in self.tables.items()}
        owned = [block_id for table in self.tables.values() for block_id in table]
        assert NULL_BLOCK not in owned and len(owned) + len(self.free) == self.pool.num_usable


def test_any_order_of_calls():
    run_state_machine_as_test(
        Allocator,
        settings=settings(
            max_examples=100,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_a_broken_pool_is_noticed(monkeypatch: pytest.MonkeyPatch):
    free = BlockPool.free
    monkeypatch.setattr(BlockPool, "free", lambda self, ids: free(self, list(ids)[::-1]))
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Allocator,
            settings=settings(
                max_examples=50, derandomize=True, database=None, phases=(Phase.generate,)
            ),
        )
