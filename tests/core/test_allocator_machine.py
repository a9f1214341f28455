"""KVCacheManager against a model that keeps, for each block and host slot, what it contains.

What belongs at a position is everything that keys and values depend on: the identity of the
request and all its tokens up to there. The model applies the moves and writes of each step, in
order; then every request must find exactly its own in its table.
"""

from collections import Counter
from random import Random
from typing import Any

import pytest
from msgspec.structs import replace

from jaxllm.core.block_pool import NULL_BLOCK, BlockPool
from jaxllm.core.host_tier import HostTier
from jaxllm.core.invariant import InvariantError
from jaxllm.core.kv_cache_manager import BlockMoves, KVCacheManager
from jaxllm.core.prefix_cache import BlockHasher, PrefixCache
from jaxllm.core.request import Request
from jaxllm.taps.interventions import AblateHead
from tests.fakes.plans import make_request

MAX_MODEL_LEN = 24
Content = tuple[object, ...] | None


class Held:
    """A request, the tokens it will turn out to have, and how far it has computed."""

    def __init__(self, request: Request, text: tuple[int, ...], identity: tuple[object, ...]):
        self.request, self.text, self.identity = request, text, identity
        self.num_computed = self.num_to_prefill = 0
        self.fed = False  # by the step being made

    def content(self, position: int) -> Content:
        return (*self.identity, self.text[: position + 1])


class Allocator:
    """Calls as the scheduler makes them, drawn at random: who leaves or grows does so before
    anybody of the same step begins or is fed.
    """

    def __init__(self, random: Random):
        self.random = random
        self.size, num_blocks = random.choice((1, 2, 4, 8)), random.randint(2, 20)
        self.pool = BlockPool(num_blocks)
        self.for_all = random.random() < 0.5
        self.cache = KVCacheManager(
            self.pool,
            self.size,
            MAX_MODEL_LEN,
            host_slots=random.choice((0, 2, 6)),
            save_all=random.random() < 0.5,
            for_all=self.for_all,
        )
        self.blocks: list[list[Content]] = [[None] * self.size for _ in range(num_blocks)]
        self.host: dict[int, list[Content]] = {}
        self.waiting: list[Held] = []
        self.running: list[Held] = []
        self.tables: dict[str, list[int]] = {}
        self.writes: list[tuple[Held, int, int]] = []
        self.feeding = False
        self.num_requests = 0
        self.happened = Counter[str]()

    def run(self, num_calls: int) -> None:
        weights = {
            self.come: 3,
            self.begin: 4,
            self.one_is_fed: 6,
            self.step_is_made: 6,
            self.a_token_is_known: 6,
            self.grow: 4,
            self.one_leaves: 2,
            self.one_gives_up: 0.3,
            self.device_fails: 0.1,
            self.ask_in_vain: 0.3,
        }
        for call in self.random.choices(tuple(weights), tuple(weights.values()), k=num_calls):
            call()
            self.check_books()

    # Requests come and go --------------------------------------------------------------------

    def come(self) -> None:
        random = self.random
        if len(self.waiting) > 4:
            return
        self.num_requests += 1
        own, text = 1000 * self.num_requests, 100 * random.choice((0, 0, 0, 1))
        differs_at = random.randint(0, 2 * MAX_MODEL_LEN)
        tokens = [text + i + (own if i >= differs_at else 0) for i in range(MAX_MODEL_LEN)]
        prompt = tuple(tokens[: random.randint(1, MAX_MODEL_LEN - 1)])
        params: dict[str, Any] = {"prompt_logprobs": 0} if random.random() < 0.1 else {}
        salt, tenant, window = random.choice(("", "", "s")), random.choice(("", "", "t")), None
        if random.random() < 0.2:
            params["attention_params"] = {"window": (window := 8)}
        head = random.choice((None, None, None, None, 1))
        if head is not None:
            params["interventions"] = [AblateHead(0, head)]
        core_request = make_request(f"r{self.num_requests}", prompt, 99, **params)
        core_request = replace(core_request, cache_salt=salt, tenant=tenant)
        request = Request(core_request, self.num_requests, MAX_MODEL_LEN)
        identity = salt, "" if self.for_all else tenant, window, head
        self.waiting.append(Held(request, tuple(tokens), identity))

    def one_gives_up(self) -> None:
        if self.waiting and not self.feeding:
            held = self.random.choice(self.waiting)
            self.waiting.remove(held)
            self.cache.give_up(held.request)

    def leave(self, held: Held, how: str) -> None:
        """As the scheduler does it."""
        if how == "failed":
            self.cache.forget_contents(held.request)
        else:
            self.cache.note_computed(held.request, held.num_computed, pauses=True)
        self.cache.free(held.request)
        self.running.remove(held)
        del self.tables[held.request.request_id]
        if how == "preempted":
            self.cache.expect_again(held.request)
            self.waiting.append(held)
        with pytest.raises(InvariantError):
            self.cache.free(held.request)

    def one_leaves(self) -> None:
        if self.running and not self.feeding:
            how = self.random.choice(("finished", "preempted", "preempted", "failed"))
            self.leave(self.random.choice(self.running), how)

    def device_fails(self) -> None:
        if self.feeding:
            return
        for held in self.running.copy():
            self.leave(held, "preempted")
        self.cache.forget_all()
        self.blocks = [[None] * self.size for _ in self.blocks]
        self.host.clear()

    def a_token_is_known(self) -> None:
        if not self.running or self.feeding:
            return
        held = self.random.choice(self.running)
        request = held.request
        if held.num_computed >= request.num_tokens < MAX_MODEL_LEN - 1:
            request.append(held.text[request.num_tokens])

    # A step is made --------------------------------------------------------------------------

    def grow(self) -> None:
        if not self.running or self.feeding:
            return
        held = self.random.choice(self.running)
        table = self.tables[held.request.request_id]
        if not held.num_to_prefill <= held.num_computed < MAX_MODEL_LEN:
            return
        self.cache.note_computed(held.request, held.num_computed, pauses=False)
        missing = max(0, self.cache.num_blocks_for(held.num_computed + 1) - len(table))
        num_free = self.pool.num_free
        appended = self.cache.allocate_slots(held.request, held.num_computed + 1)
        if missing > num_free:
            assert appended is None
            return
        assert appended is not None and [index for index, _ in appended] == list(
            range(len(table), len(table) + missing)
        )
        table += [block_id for _, block_id in appended]

    def begin(self) -> None:
        if not self.waiting:
            return
        held = self.random.choice(self.waiting)
        request = held.request
        num_cached = self.cache.num_cached_tokens(request)
        begun = self.cache.begin(request)
        if begun is None:
            wanted = self.cache.num_blocks_for(request.num_tokens)
            assert self.pool.num_free < wanted
            return
        assert num_cached <= begun.num_computed < request.num_tokens
        assert [index for index, _ in begun.entries] == list(
            range(self.cache.num_blocks_for(request.num_tokens))
        )
        self.feeding = True
        self.waiting.remove(held)
        self.running.append(held)
        self.tables[request.request_id] = [block_id for _, block_id in begun.entries]
        held.num_computed, held.num_to_prefill = begun.num_computed, request.num_tokens
        self.happened["hits"] += begun.num_computed > 0
        self.feed(held)  # as everybody who begins is

    def one_is_fed(self) -> None:
        due = [held for held in self.running if not held.fed]
        if due:
            self.feed(self.random.choice(due))

    def feed(self, held: Held) -> None:
        request, start = held.request, held.num_computed
        if start < held.num_to_prefill:
            end = min(start + self.random.randint(1, MAX_MODEL_LEN), held.num_to_prefill)
            pauses = end == held.num_to_prefill
            self.cache.note_computed(request, end, in_this_step=True, pauses=pauses)
        else:  # its newest token, which the host may not know yet
            end = start + 1
            room = len(self.tables[request.request_id]) * self.size
            if end > min(room, request.num_tokens + 1, MAX_MODEL_LEN):
                return
        self.feeding = held.fed = True
        held.num_computed = end
        self.writes.append((held, start, end))

    def step_is_made(self) -> None:
        if not self.feeding:
            return
        self.apply(self.cache.step_made())
        for held, start, end in self.writes:
            for position in range(start, end):
                block_id = self.tables[held.request.request_id][position // self.size]
                self.blocks[block_id][position % self.size] = held.content(position)
        for held in self.running:
            table = self.tables[held.request.request_id]
            for position in range(held.num_computed):
                found = self.blocks[table[position // self.size]][position % self.size]
                assert found == held.content(position), "what it finds is not its own"
            held.fed = False
        self.writes, self.feeding = [], False

    def apply(self, moves: BlockMoves) -> None:
        for block_id, slot in moves.saves:
            assert 0 <= slot < self.cache.host.num_slots
            self.host[slot] = self.blocks[block_id].copy()
        copied = [(target, self.blocks[source].copy()) for source, target in moves.copies]
        for target, content in copied:
            self.blocks[target] = content
        for slot, block_id in moves.loads:
            self.blocks[block_id] = self.host[slot].copy()
        self.happened.update(
            saves=len(moves.saves), copies=len(moves.copies), loads=len(moves.loads)
        )

    # Books -----------------------------------------------------------------------------------

    def ask_in_vain(self) -> None:
        num_tokens = self.random.randint(0, 200)
        needed = -(-num_tokens // self.size)
        assert self.cache.can_ever_hold(num_tokens) == (needed <= self.pool.num_blocks - 1)
        too_many = self.cache.max_blocks_per_request * self.size + 1
        for held in self.running[:1]:
            with pytest.raises(InvariantError):
                self.cache.allocate_slots(held.request, too_many)

    def check_books(self) -> None:
        owners = Counter(block_id for table in self.tables.values() for block_id in table)
        free = list(self.pool.free_blocks())
        assert self.cache.tables() == {name: tuple(t) for name, t in self.tables.items()}
        assert self.pool.owners() == [owners[i] for i in range(self.pool.num_blocks)]
        assert len(set(free)) == len(free) == self.pool.num_free and not owners.keys() & set(free)
        assert NULL_BLOCK not in owners and len(owners) + len(free) == self.pool.num_usable
        assert self.pool.usage == pytest.approx(1 - len(free) / self.pool.num_usable)
        assert set(self.pool.kept_blocks()) == self.cache.prefix.block_ids()


def run_machines(seeds: range) -> Counter[str]:
    happened = Counter[str]()
    for seed in seeds:
        machine = Allocator(Random(seed))
        machine.run(400)
        happened += machine.happened
    return happened


def test_any_order_of_calls():
    happened = run_machines(range(150))
    assert min(happened[what] for what in ("hits", "saves", "copies", "loads")) > 50, happened


def root_without(index: int) -> Any:
    root = BlockHasher.root
    return lambda self, *parts: root(self, *parts[:index], *parts[index + 1 :])


def similar_too_far(self: PrefixCache, parent: bytes, wanted: Any) -> tuple[int, int]:
    source, num_common = find_similar(self, parent, wanted)
    return source, min(num_common + 1, wanted.size) if num_common else 0


find_similar = PrefixCache.find_similar
BROKEN = {
    "copies too far": (PrefixCache, "find_similar", similar_too_far),
    "attention params": (BlockHasher, "root", root_without(1)),
    "tenants": (BlockHasher, "root", root_without(2)),
    "salts": (BlockHasher, "root", root_without(3)),
    "interventions": (BlockHasher, "root", root_without(4)),
    "what makes way is still found": (KVCacheManager, "_discard", lambda *args: None),
    "slots outlive the device": (HostTier, "clear", lambda self: None),
    "contents are never given out": (BlockPool, "free", lambda self, ids: None),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(*BROKEN[what])
    with pytest.raises((AssertionError, InvariantError, KeyError)):
        run_machines(range(150))
