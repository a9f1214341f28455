"""Block tables: which blocks hold the tokens of which request. Knows no rows and no scheduling."""

from jaxllm.core.block_pool import BlockPool
from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import Request


class KVCacheManager:
    """One append-only block table per request that holds blocks.

    A block never moves inside a table, so the device needs to hear only of appended entries.
    """

    def __init__(self, pool: BlockPool, block_size: int, max_model_len: int):
        self.pool = pool
        self.block_size = block_size
        self.max_blocks_per_request = -(-max_model_len // block_size)
        self._tables: dict[str, list[int]] = {}

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether an otherwise empty pool has room for that many tokens of one request."""
        return self.num_blocks_for(num_tokens) <= self.pool.num_usable

    def allocate_slots(
        self, request: Request, num_tokens: int
    ) -> tuple[tuple[int, int], ...] | None:
        """Grow the table until it holds the request's first ``num_tokens`` tokens.

        Returns the appended (index in the table, block id), or None, with nothing changed,
        when the pool has too few blocks.
        """
        table = self._tables.get(request.request_id, [])
        first, wanted = len(table), self.num_blocks_for(num_tokens)
        if wanted > self.max_blocks_per_request:
            raise InvariantError(
                f"Request {request.request_id!r} wants room for {num_tokens} tokens, more than "
                f"{self.max_blocks_per_request} blocks of {self.block_size}."
            )
        ids = self.pool.allocate(max(0, wanted - first))
        if ids is None:
            return None
        self._tables[request.request_id] = table
        table.extend(ids)
        return tuple(enumerate(ids, first))

    def free(self, request: Request) -> None:
        """Give all blocks of the request back. A request without blocks is a bug."""
        table = self._tables.pop(request.request_id, None)
        if table is None:
            raise InvariantError(f"Request {request.request_id!r} holds no blocks to free.")
        self.pool.free(table)

    def block_ids(self, request: Request) -> tuple[int, ...]:
        return tuple(self._tables.get(request.request_id, ()))

    def tables(self) -> dict[str, tuple[int, ...]]:
        """All tables by request id; a copy, for checks."""
        return {request_id: tuple(table) for request_id, table in self._tables.items()}
