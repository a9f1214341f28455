import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxllm.core.block_pool import NULL_BLOCK, BlockPool
from jaxllm.core.invariant import InvariantError


def test_null_block_is_never_given_out():
    pool = BlockPool(4)
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate(1) is None
    assert pool.usage == 1.0


def test_allocation_is_all_or_nothing():
    pool = BlockPool(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []


def test_first_freed_is_first_allocated():
    pool = BlockPool(4)
    pool.allocate(3)
    pool.free([2, 1])
    assert pool.allocate(2) == [2, 1]


@pytest.mark.parametrize("ids", [[1, 1], [2], [NULL_BLOCK], [-1], [4]])
def test_freeing_what_is_not_owned_is_an_error(ids: list[int]):
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(InvariantError):
        pool.free(ids)


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_pool_without_usable_blocks_is_refused(num_blocks: int):
    with pytest.raises(InvariantError):
        BlockPool(num_blocks)


class PoolMachine(RuleBasedStateMachine):
    """Against a model that is two sets."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.owned: list[int] = []

    @rule(n=st.integers(0, 14))
    def allocate(self, n: int) -> None:
        ids = self.pool.allocate(n)
        if n > 11 - len(self.owned):
            assert ids is None
            return
        assert ids is not None and len(set(ids)) == n
        assert not set(ids) & set(self.owned) and NULL_BLOCK not in ids
        self.owned += ids

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(self.owned), unique=True))
        self.pool.free(ids)
        self.owned = [i for i in self.owned if i not in ids]

    @rule(block_id=st.integers(-2, 14))
    def free_unowned(self, block_id: int) -> None:
        if block_id not in self.owned:
            with pytest.raises(InvariantError):
                self.pool.free([block_id])

    @invariant()
    def free_and_owned_are_everything(self) -> None:
        free = list(self.pool.free_blocks())
        assert sorted([*free, *self.owned]) == list(range(1, 12))
        assert self.pool.num_free == len(free)
        assert self.pool.usage == pytest.approx(len(self.owned) / 11)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, database=None
)
