import pytest

from jaxllm.core.block_pool import BlockPool
from jaxllm.core.invariant import InvariantError
from jaxllm.core.kv_cache_manager import KVCacheManager
from jaxllm.core.request import Request
from tests.fakes.plans import make_request


def manager_and_request(num_blocks: int = 8) -> tuple[KVCacheManager, Request]:
    return KVCacheManager(BlockPool(num_blocks), 4, 20), Request(make_request(), 0, 20)


def test_table_grows_by_whole_blocks():
    manager, request = manager_and_request()
    assert manager.allocate_slots(request, 5) == ((0, 1), (1, 2))
    assert manager.allocate_slots(request, 8) == ()
    assert manager.allocate_slots(request, 9) == ((2, 3),)
    assert manager.block_ids(request) == (1, 2, 3)


def test_nothing_changes_when_the_pool_is_short():
    manager, request = manager_and_request(num_blocks=3)
    assert manager.allocate_slots(request, 4) == ((0, 1),)
    assert manager.allocate_slots(request, 16) is None
    assert manager.block_ids(request) == (1,)
    assert manager.pool.num_free == 1


def test_a_request_that_got_nothing_has_no_table():
    manager, request = manager_and_request(num_blocks=2)
    assert manager.allocate_slots(request, 5) is None
    assert manager.tables() == {}


def test_free_returns_everything_once():
    manager, request = manager_and_request()
    manager.allocate_slots(request, 20)
    manager.free(request)
    assert manager.pool.num_free == 7
    assert manager.block_ids(request) == ()
    with pytest.raises(InvariantError):
        manager.free(request)


def test_a_table_never_outgrows_max_model_len():
    manager, request = manager_and_request(num_blocks=20)
    with pytest.raises(InvariantError):
        manager.allocate_slots(request, 21)


def test_can_ever_hold_counts_usable_blocks():
    manager, _ = manager_and_request(num_blocks=3)
    assert manager.can_ever_hold(8)
    assert not manager.can_ever_hold(9)
