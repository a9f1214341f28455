"""Block tables: which blocks hold the tokens of which request. Knows no rows and no scheduling.

Keys and values that were computed once are found again by the tokens they belong to, and shared:
by requests that run at the same time, and with those that have left as long as nobody needs their
blocks for something else.

When a block's contents are noted, the step that computes them may not have run yet. That is soon
enough for sharing, since whoever reads them does so in the same step or a later one, and a step
writes all keys and values of a layer before it attends over them. Copies are made before a step
begins, so contents of the step being made cannot be copied yet.

Blocks that have to leave the device may be saved to the host's memory, and loaded again when their
tokens come back. Within a step all saves go first, then copies, then loads. What is saved may be
written to a file, too; what is on file alone is first read into the host's memory.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from jaxllm.core.block_pool import BlockPool
from jaxllm.core.disk_tier import DiskTier
from jaxllm.core.host_tier import HostTier
from jaxllm.core.invariant import InvariantError
from jaxllm.core.prefix_cache import BlockHasher, PrefixCache
from jaxllm.core.request import Request
from jaxllm.taps.interventions import interventions_key


class Start(NamedTuple):
    """How a request enters the batch."""

    entries: tuple[tuple[int, int], ...]  # (index in the table, block id)
    num_computed: int  # its first tokens whose keys and values are there already


@dataclass(slots=True)
class BlockMoves:
    """What is to be done with blocks before a step, in this order."""

    saves: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # (block, slot)
    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # (from, to)
    loads: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # (slot, block)
    # Of the saves, which get a file: (index, name)
    writes: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])


@dataclass(slots=True)
class _Table:
    blocks: list[int]
    num_noted: int = 0  # full blocks whose contents the cache has been told of


class KVCacheManager:
    """One append-only block table per request that holds blocks.

    A block never moves inside a table, so the device needs to hear only of appended entries.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_model_len: int,
        *,
        caching: bool = True,
        key: bytes = b"",
        identity: str = "",
        host_slots: int = 0,
        save_all: bool = False,
        on_disk: bool = False,
        for_all: bool = False,
    ):
        """``key`` is for the hashes, ``identity`` what all requests' keys and values depend on.
        ``save_all``: not only blocks of preempted requests are worth a slot on the host.
        ``on_disk``: whatever is saved there is written to a file as well.
        ``for_all``: tenants share what they have in common.
        """
        self.pool = pool
        self.block_size = block_size
        self.max_blocks_per_request = -(-max_model_len // block_size)
        self.caching = caching
        self.prefix = PrefixCache()
        self.host = HostTier(host_slots)
        self.disk = DiskTier(self.host, enabled=on_disk)
        self.num_saved_blocks = self.num_loaded_blocks = 0
        self.num_queried_tokens = self.num_hit_tokens = 0
        self._hasher = BlockHasher(key, block_size)
        self._identity = identity
        self._tables: dict[str, _Table] = {}
        self._fresh: set[int] = set()  # noted since the last step was made
        self._moves = BlockMoves()
        self._save_all = save_all or on_disk
        self._for_all = for_all
        self._awaited: dict[str, frozenset[bytes]] = {}  # hashes of preempted requests' blocks
        self._least_copied = max(1, block_size // 4)  # tokens; fewer are computed as quickly

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether an otherwise empty pool has room for that many tokens of one request."""
        return self.num_blocks_for(num_tokens) <= self.pool.num_usable

    # Getting blocks --------------------------------------------------------------------------

    def num_cached_tokens(self, request: Request) -> int:
        """Of the tokens that it would feed now, how many are in blocks that are there."""
        return len(self._find(request)) * self.block_size

    def num_common_tokens(self, request: Request, other: Request) -> int:
        """Of the tokens that ``request`` would feed now, how many are in full blocks that it would
        share with ``other``.
        """
        if not self._may_share(request):
            return 0
        size = self.block_size
        most = min((request.num_tokens - 1) // size, other.num_tokens // size)
        mine, others = (self._chain(r, most * size) for r in (request, other))
        differ = bisect_left(range(1, most + 1), True, key=lambda i: mine[i] != others[i])
        return differ * size if mine[0] == others[0] else 0

    def begin(self, request: Request) -> Start | None:
        """Give a request blocks for all its known tokens, those in the cache first.

        At least its newest token is left to compute, for there is something to be sampled. None,
        with nothing changed, when the pool has too few blocks.
        """
        found = self._find(request)
        shared = [block_id for block_id in found if block_id is not None]
        num_fresh = self.num_blocks_for(request.num_tokens) - len(shared)
        num_taken = sum(self.pool.num_owners(block_id) == 0 for block_id in shared)
        if num_fresh > self.pool.num_free - num_taken:
            return None
        for block_id in shared:
            self.pool.share(block_id)
        loaded = [index for index, block_id in enumerate(found) if block_id is None]
        slots = [self.host.get(request.chain[index + 1]) for index in loaded]
        num_computed = len(found) * self.block_size
        source, num_common = self._similar(request, num_computed)
        fresh = self._allocate(num_fresh)
        if not fresh:
            raise InvariantError(f"No block is left for request {request.request_id!r}.")
        unused = iter(fresh)
        blocks = [next(unused) if block_id is None else block_id for block_id in found]
        blocks += unused
        if num_common >= self._least_copied:  # even if the source has just been given out
            self._moves.copies.append((source, blocks[len(found)]))
            num_computed += num_common
        for slot, index in zip(slots, loaded, strict=True):
            self._load(request, slot, index, blocks[index])
        self._awaited.pop(request.request_id, None)
        self._tables[request.request_id] = _Table(blocks, len(found))
        self._count(request, num_computed)
        return Start(tuple(enumerate(blocks)), num_computed)

    def fetch(self, request: Request) -> bool:
        """Ask for the blocks of the request's tokens that are on file, as far as they follow each
        other and what is there. Whether any is coming.
        """
        if not self.disk.enabled or not self._may_share(request):
            return False
        found, size, coming = len(self._find(request)), self.block_size, False
        for block_hash in request.chain[found + 1 : (request.num_tokens - 1) // size + 1]:
            if self.prefix.find(block_hash) is not None or block_hash in self.host:
                continue
            if not self.disk.fetch(block_hash):
                break
            coming = True
        return coming

    def is_fetching(self, request: Request) -> bool:
        """Whether any of the request's blocks is still being read from a file."""
        return self.disk.is_reading and any(map(self.disk.is_coming, request.chain[1:]))

    def allocate_slots(
        self, request: Request, num_tokens: int
    ) -> tuple[tuple[int, int], ...] | None:
        """Grow the table of a request that has begun until it holds its first ``num_tokens``
        tokens.

        Returns the appended (index in the table, block id), or None, with nothing changed,
        when the pool has too few blocks.
        """
        table = self._tables[request.request_id].blocks
        first, wanted = len(table), self.num_blocks_for(num_tokens)
        if wanted > self.max_blocks_per_request:
            raise InvariantError(
                f"Request {request.request_id!r} wants room for {num_tokens} tokens, more than "
                f"{self.max_blocks_per_request} blocks of {self.block_size}."
            )
        ids = self._allocate(max(0, wanted - first))
        if ids is None:
            return None
        table.extend(ids)
        return tuple(enumerate(ids, first))

    def free(self, request: Request) -> None:
        """Give all blocks of the request back. A request without blocks is a bug.

        Its last ones are the first that others get: what comes before them is of use without them,
        but not the other way round.
        """
        table = self._tables.pop(request.request_id, None)
        if table is None:
            raise InvariantError(f"Request {request.request_id!r} holds no blocks to free.")
        self.pool.free(reversed(table.blocks))

    # What they hold --------------------------------------------------------------------------

    def note_computed(
        self, request: Request, num_computed: int, *, in_this_step: bool = False, pauses: bool
    ) -> None:
        """The request's first ``num_computed`` tokens have been computed, or will have been by the
        step being made (``in_this_step``). With ``pauses`` what the last block holds by then is
        worth noting as well.
        """
        if not self.caching:
            return
        table, size = self._tables[request.request_id], self.block_size
        num_known = min(num_computed, request.num_tokens)
        chain = self._chain(request, num_known)
        noted: list[int] = []
        for index in range(table.num_noted, num_known // size):
            block_id, block_hash = table.blocks[index], chain[index + 1]
            if block_hash in self.prefix:  # that one is as good
                self._discard((block_id,))
                continue
            tokens = request.tokens_between(index * size, (index + 1) * size)
            self._note(block_id, chain[index], tokens, block_hash)
            noted.append(block_id)
        table.num_noted = max(table.num_noted, num_known // size)
        begun = num_known - num_known % size
        if pauses and num_known - begun >= self._least_copied:
            block_id = table.blocks[begun // size]
            tokens = request.tokens_between(begun, num_known)
            self._note(block_id, chain[begun // size], tokens, None)
            noted.append(block_id)
        if in_this_step:
            self._fresh.update(noted)

    def expect_again(self, request: Request) -> None:
        """A preempted request: what it has computed is worth saving."""
        if len(self._chain(request, 0)) > 1:
            self._awaited[request.request_id] = frozenset(request.chain[1:])

    def give_up(self, request: Request) -> None:
        """It will not come back."""
        self._awaited.pop(request.request_id, None)

    def step_made(self) -> BlockMoves:
        """What is to be moved before the step that has been made. What was noted until now will
        have been computed before the next one begins.
        """
        moves, self._moves = self._moves, BlockMoves()
        self._fresh.clear()
        self.host.step_made()
        return moves

    def forget_contents(self, request: Request) -> None:
        """Nobody is to share what this request has computed."""
        self._discard(self._tables[request.request_id].blocks)

    def forget_all(self) -> None:
        """The contents of all blocks are lost."""
        self._discard(self.prefix.block_ids())
        self.host.clear()
        self.disk.forget_reads()
        self._moves = BlockMoves()

    # For checks and inspection ---------------------------------------------------------------

    def block_ids(self, request: Request) -> tuple[int, ...]:
        table = self._tables.get(request.request_id)
        return () if table is None else tuple(table.blocks)

    def tables(self) -> dict[str, tuple[int, ...]]:
        """All tables by request id; a copy, for checks."""
        return {request_id: tuple(table.blocks) for request_id, table in self._tables.items()}

    # -----------------------------------------------------------------------------------------

    def _may_share(self, request: Request) -> bool:
        return self.caching and not request.owes_prompt_logprobs  # these take computing it all

    def _find(self, request: Request) -> list[int | None]:
        """Blocks of the request's first tokens, as far as they are skippable; None for a block that
        the host's memory has.
        """
        if not self._may_share(request):
            return []
        most = request.num_skippable // self.block_size
        found: list[int | None] = []
        for block_hash in islice(self._chain(request, most * self.block_size), 1, most + 1):
            block_id = self.prefix.find(block_hash)
            if block_id is None and block_hash not in self.host:
                break
            found.append(block_id)
        return found

    def _similar(self, request: Request, num_shared: int) -> tuple[int, int]:
        """As PrefixCache.find_similar, for the block after the shared ones."""
        if not self._may_share(request):
            return 0, 0
        end = min(num_shared + self.block_size, request.num_skippable)
        wanted = request.tokens_between(num_shared, end)
        parent = request.chain[num_shared // self.block_size]
        source, num_common = self.prefix.find_similar(parent, wanted)
        return (0, 0) if source in self._fresh else (source, num_common)

    def _chain(self, request: Request, num_tokens: int) -> list[bytes]:
        """The request's hashes, made as far as its first ``num_tokens`` tokens reach."""
        chain = request.chain
        if not chain:
            asked = request.core_request
            tenant = "" if self._for_all else asked.tenant
            params = asked.sampling_params
            attention = json.dumps(params.attention_params, sort_keys=True)
            changed = interventions_key(params.interventions)
            root = (self._identity, attention, tenant, asked.cache_salt, changed)
            chain.append(self._hasher.root(*root))
        done = (len(chain) - 1) * self.block_size
        if num_tokens - done >= self.block_size:
            self._hasher.extend(chain, request.tokens_between(done, num_tokens))
        return chain

    def _allocate(self, num_blocks: int) -> list[int] | None:
        """As BlockPool.allocate; saves what is worth it."""
        ids = self.pool.allocate(num_blocks)
        for block_id in ids or ():
            block_hash = self.prefix.hash_of(block_id)
            if block_hash is not None and self._is_worth_saving(block_hash):
                slot = self.host.put(block_hash)
                if slot is not None:
                    if self.disk.wants(block_hash):
                        self._moves.writes.append((len(self._moves.saves), block_hash))
                    self._moves.saves.append((block_id, slot))
                    self.num_saved_blocks += 1
        self._discard(ids or ())
        return ids

    def _is_worth_saving(self, block_hash: bytes) -> bool:
        if not self.host.num_slots:
            return False
        return self._save_all or any(block_hash in hashes for hashes in self._awaited.values())

    def _load(self, request: Request, slot: int, index: int, block_id: int) -> None:
        """Fill a block of the request's table from the host's memory."""
        self._moves.loads.append((slot, block_id))
        self.num_loaded_blocks += 1
        start = index * self.block_size
        tokens = request.tokens_between(start, start + self.block_size)
        self._note(block_id, request.chain[index], tokens, request.chain[index + 1])
        self._fresh.add(block_id)

    def _note(
        self, block_id: int, parent: bytes, token_ids: np.ndarray, block_hash: bytes | None
    ) -> None:
        """As PrefixCache.add, and keep what it knows, no more."""
        forgotten = self.prefix.add(block_id, parent, token_ids, block_hash)
        self.pool.keep(block_id)
        if forgotten is not None:
            self.pool.forget(forgotten)

    def _discard(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self.prefix.discard(block_id)
            self.pool.forget(block_id)

    def _count(self, request: Request, num_computed: int) -> None:
        if self.caching and request.num_cached_tokens is None:
            self.num_queried_tokens += request.num_tokens
            self.num_hit_tokens += num_computed
        if request.num_cached_tokens is None:
            request.num_cached_tokens = num_computed
