"""Block tables: which blocks hold the tokens of which request. Knows no rows and no scheduling.

Keys and values that were computed once are found again by the tokens they belong to, and shared:
by requests that run at the same time, and with those that have left as long as nobody needs their
blocks for something else.

When a block's contents are noted, the step that computes them may not have run yet. That is soon
enough for sharing, since whoever reads them does so in the same step or a later one, and a step
writes all keys and values of a layer before it attends over them. Copies are made before a step
begins, so contents of the step being made cannot be copied yet.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from jaxllm.core.block_pool import BlockPool
from jaxllm.core.invariant import InvariantError
from jaxllm.core.prefix_cache import BlockHasher, PrefixCache
from jaxllm.core.request import Request


class Start(NamedTuple):
    """How a request enters the batch."""

    entries: tuple[tuple[int, int], ...]  # (index in the table, block id)
    num_computed: int  # its first tokens whose keys and values are there already
    copy: tuple[int, int] | None  # (from, to): a block to be copied before its first step


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
    ):
        """``key`` is for the hashes, ``identity`` what all requests' keys and values depend on."""
        self.pool = pool
        self.block_size = block_size
        self.max_blocks_per_request = -(-max_model_len // block_size)
        self.caching = caching
        self.prefix = PrefixCache()
        self.num_queried_tokens = self.num_hit_tokens = 0
        self._hasher = BlockHasher(key, block_size)
        self._identity = identity
        self._tables: dict[str, _Table] = {}
        self._fresh: set[int] = set()  # noted since the last step was made
        self._least_copied = max(1, block_size // 4)  # tokens; fewer are computed as quickly

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether an otherwise empty pool has room for that many tokens of one request."""
        return self.num_blocks_for(num_tokens) <= self.pool.num_usable

    # Getting blocks --------------------------------------------------------------------------

    def num_cached_tokens(self, request: Request) -> int:
        """Of the tokens that it would feed now, how many are in blocks that it would share."""
        return len(self._shareable(request)) * self.block_size

    def begin(self, request: Request) -> Start | None:
        """Give a request blocks for all its known tokens, those in the cache first.

        At least its newest token is left to compute, for there is something to be sampled. None,
        with nothing changed, when the pool has too few blocks.
        """
        shared = self._shareable(request)
        num_fresh = self.num_blocks_for(request.num_tokens) - len(shared)
        num_taken = sum(self.pool.num_owners(block_id) == 0 for block_id in shared)
        if num_fresh > self.pool.num_free - num_taken:
            return None
        for block_id in shared:
            self.pool.share(block_id)
        fresh = self.pool.allocate(num_fresh)
        if not fresh:
            raise InvariantError(f"No block is left for request {request.request_id!r}.")
        num_computed, copy = len(shared) * self.block_size, None
        source, num_common = self._similar(request, num_computed)
        if num_common >= self._least_copied:
            num_computed += num_common
            copy = (source, fresh[0])  # even if it has just been given out: copies go first
        self._discard(fresh)
        self._tables[request.request_id] = _Table([*shared, *fresh], len(shared))
        self._count(request, num_computed)
        return Start(tuple(enumerate((*shared, *fresh))), num_computed, copy)

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
        ids = self.pool.allocate(max(0, wanted - first))
        if ids is None:
            return None
        self._discard(ids)
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
            self.prefix.add(block_id, chain[index], tokens, block_hash)
            noted.append(block_id)
        table.num_noted = max(table.num_noted, num_known // size)
        begun = num_known - num_known % size
        if pauses and num_known - begun >= self._least_copied:
            block_id = table.blocks[begun // size]
            tokens = request.tokens_between(begun, num_known)
            self.prefix.add(block_id, chain[begun // size], tokens, None)
            noted.append(block_id)
        for block_id in noted:
            self.pool.keep(block_id)
        if in_this_step:
            self._fresh.update(noted)

    def step_made(self) -> None:
        """What was noted until now will have been computed before the next step begins."""
        self._fresh.clear()

    def forget_contents(self, request: Request) -> None:
        """Nobody is to share what this request has computed."""
        self._discard(self._tables[request.request_id].blocks)

    def forget_all(self) -> None:
        """The contents of all blocks are lost."""
        self._discard(self.prefix.block_ids())

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

    def _shareable(self, request: Request) -> list[int]:
        """Cached blocks of the request's first tokens, its newest one left out."""
        if not self._may_share(request):
            return []
        most = (request.num_tokens - 1) // self.block_size
        return self.prefix.find(self._chain(request, most * self.block_size)[1 : most + 1])

    def _similar(self, request: Request, num_shared: int) -> tuple[int, int]:
        """As PrefixCache.find_similar, for the block after the shared ones."""
        if not self._may_share(request):
            return 0, 0
        end = min(num_shared + self.block_size, request.num_tokens - 1)
        wanted = request.tokens_between(num_shared, end)
        parent = request.chain[num_shared // self.block_size]
        source, num_common = self.prefix.find_similar(parent, wanted)
        return (0, 0) if source in self._fresh else (source, num_common)

    def _chain(self, request: Request, num_tokens: int) -> list[bytes]:
        """The request's hashes, made as far as its first ``num_tokens`` tokens reach."""
        chain = request.chain
        if not chain:
            chain.append(self._hasher.root(self._identity, request.core_request.cache_salt))
        done = (len(chain) - 1) * self.block_size
        if num_tokens - done >= self.block_size:
            self._hasher.extend(chain, request.tokens_between(done, num_tokens))
        return chain

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
