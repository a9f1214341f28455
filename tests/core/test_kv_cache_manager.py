from typing import Any

import pytest
from msgspec.structs import replace

from jaxllm.core.block_pool import BlockPool
from jaxllm.core.invariant import InvariantError
from jaxllm.core.kv_cache_manager import BlockMoves, KVCacheManager, Start
from jaxllm.core.request import Request
from tests.fakes.plans import make_request

TEXT = tuple(range(20))


def manager_of(
    num_blocks: int = 16, *, caching: bool = True, host_slots: int = 0, save_all: bool = True
) -> KVCacheManager:
    pool = BlockPool(num_blocks)
    return KVCacheManager(pool, 4, 20, caching=caching, host_slots=host_slots, save_all=save_all)


def request_of(name: str, prompt: tuple[int, ...] = TEXT[:5], **params: Any) -> Request:
    return Request(make_request(name, prompt, **params), 0, 20)


def compute(
    manager: KVCacheManager, request: Request, num_computed: int | None = None
) -> tuple[Start, BlockMoves]:
    """Begin, and compute that much, by default all."""
    start = manager.begin(request)
    assert start is not None
    count = request.num_tokens if num_computed is None else num_computed
    manager.note_computed(request, count, in_this_step=True, pauses=True)
    return start, manager.step_made()


def test_table_grows_by_whole_blocks():
    manager, request = manager_of(), request_of("a")
    assert manager.begin(request) == Start(((0, 1), (1, 2)), 0)
    assert manager.allocate_slots(request, 8) == ()
    assert manager.allocate_slots(request, 9) == ((2, 3),)
    assert manager.block_ids(request) == (1, 2, 3)


def test_nothing_changes_when_the_pool_is_short():
    manager, request = manager_of(num_blocks=3), request_of("a")
    manager.begin(request)
    assert manager.allocate_slots(request, 16) is None
    assert manager.begin(request_of("b")) is None
    assert manager.tables() == {"a": (1, 2)} and manager.pool.num_free == 0


def test_free_returns_everything_once():
    manager, request = manager_of(num_blocks=8), request_of("a")
    manager.begin(request)
    manager.free(request)
    assert manager.pool.num_free == 7
    assert manager.block_ids(request) == ()
    with pytest.raises(InvariantError):
        manager.free(request)


def test_a_table_never_outgrows_max_model_len():
    manager, request = manager_of(num_blocks=20), request_of("a")
    manager.begin(request)
    with pytest.raises(InvariantError):
        manager.allocate_slots(request, 21)


def test_can_ever_hold_counts_usable_blocks():
    manager = manager_of(num_blocks=3)
    assert manager.can_ever_hold(8)
    assert not manager.can_ever_hold(9)


def test_full_blocks_are_shared_with_who_runs_and_found_again_afterwards():
    manager, first = manager_of(), request_of("a", TEXT[:10])
    compute(manager, first)
    second = request_of("b", (*TEXT[:8], 90, 91))
    assert compute(manager, second)[0] == Start(((0, 1), (1, 2), (2, 4)), 8)
    assert manager.pool.num_owners(1) == 2
    manager.free(first)
    manager.free(second)
    assert manager.pool.num_free == manager.pool.num_usable
    third = request_of("c", (*TEXT[:8], 92))
    assert compute(manager, third)[0].num_computed == 8
    assert manager.num_hit_tokens == 16 and third.num_cached_tokens == 8


def test_the_newest_token_is_always_left_to_compute():
    manager = manager_of()
    compute(manager, request_of("a", TEXT[:8]))
    start, moves = compute(manager, request_of("b", TEXT[:8]))
    # Seven of eight: the second block is copied, for its last token is written anew.
    assert start == Start(((0, 1), (1, 3)), 7) and moves.copies == [(2, 3)]


def test_a_block_is_copied_up_to_where_the_texts_part():
    manager = manager_of()
    compute(manager, request_of("a", TEXT[:7]))
    start, moves = compute(manager, request_of("b", (*TEXT[:6], 90, 91)))
    assert start == Start(((0, 1), (1, 3)), 6) and moves.copies == [(2, 3)]


def test_what_the_step_itself_computes_is_shared_but_not_copied():
    manager, first, second = manager_of(), request_of("a", TEXT[:7]), request_of("b", TEXT[:7])
    manager.begin(first)
    manager.note_computed(first, 7, in_this_step=True, pauses=True)
    assert manager.begin(second) == Start(((0, 1), (1, 3)), 4)
    assert manager.step_made() == BlockMoves()


def test_only_what_was_computed_is_shared():
    manager, first = manager_of(), request_of("a", TEXT[:12])
    compute(manager, first, 6)
    assert compute(manager, request_of("b", TEXT[:12]))[0].num_computed == 6


@pytest.mark.parametrize(
    "difference", ["salt", "tenant", "off", "attention", "prompt_logprobs", "failed", "lost"]
)
def test_nothing_is_shared(difference: str):
    manager, first = manager_of(caching=difference != "off"), request_of("a", TEXT[:9])
    compute(manager, first)
    if difference == "failed":
        manager.forget_contents(first)
    if difference == "lost":
        manager.forget_all()
    asked = {
        "attention": {"attention_params": {"rate": 1.0}},
        "prompt_logprobs": {"prompt_logprobs": 0},
    }
    second = request_of("b", TEXT[:9], **asked.get(difference, {}))
    if difference in ("salt", "tenant"):
        name = {"salt": "cache_salt"}.get(difference, difference)
        second = Request(replace(make_request("b", TEXT[:9]), **{name: "x"}), 0, 20)
    start = manager.begin(second)
    assert start is not None and start.num_computed == 0
    assert manager.step_made() == BlockMoves()
    assert not set(manager.block_ids(second)) & set(manager.block_ids(first))


def test_the_ends_of_texts_make_way_before_their_beginnings():
    manager, first = manager_of(num_blocks=5), request_of("a", TEXT[:16])
    compute(manager, first)
    manager.free(first)
    compute(manager, request_of("b", tuple(range(50, 58))))
    again = request_of("c", TEXT[:9])
    assert manager.num_cached_tokens(again) == 8


def test_blocks_of_the_same_text_are_kept_once():
    manager, first, second = manager_of(), request_of("a", TEXT[:8]), request_of("b", TEXT[:8])
    manager.begin(first)
    manager.begin(second)
    for request in (first, second):
        manager.note_computed(request, 8, pauses=True)
    assert set(manager.pool.kept_blocks()) == {1, 2}
    manager.free(first)
    manager.free(second)
    assert sorted(manager.pool.kept_blocks()) == [1, 2]


@pytest.mark.parametrize("reason", ["preempted", "save_all", "finished", "given up"])
def test_blocks_that_make_way_are_saved_where_they_are_worth_it(reason: str):
    manager = manager_of(num_blocks=5, host_slots=3, save_all=reason == "save_all")
    first = request_of("a", TEXT[:16])
    compute(manager, first)
    manager.free(first)
    if reason in ("preempted", "given up"):
        manager.expect_again(first)
    if reason == "given up":
        manager.give_up(first)
    other = request_of("b", tuple(range(50, 66)))
    _, moves = compute(manager, other)
    if reason in ("finished", "given up"):
        assert moves == BlockMoves()
        return
    # The end of the text makes way first; the host has three slots, the newest three stay.
    assert moves.saves == [(4, 0), (3, 1), (2, 2), (1, 0)]
    manager.free(other)
    start, moves = compute(manager, first)
    assert start.num_computed == 12 and [slot for slot, _ in moves.loads] == [0, 2, 1]
    assert {block for _, block in moves.loads} == {block for _, block in start.entries[:3]}
    assert (manager.num_saved_blocks >= 4) and manager.num_loaded_blocks == 3


def test_the_host_loses_everything_with_the_device():
    manager, first = manager_of(num_blocks=5, host_slots=3), request_of("a", TEXT[:16])
    compute(manager, first)
    manager.free(first)
    other = request_of("b", tuple(range(50, 66)))
    manager.begin(other)
    manager.free(other)
    manager.forget_all()
    start, moves = compute(manager, first)
    assert start.num_computed == 0 and moves == BlockMoves()
