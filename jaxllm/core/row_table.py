"""Columns by row: how far each running request has come. Knows no queue, no blocks, no policy.

A step over hundreds of decoding rows reads and advances these columns with a few numpy calls;
it builds no object per row.
"""

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from jaxllm.core.invariant import InvariantError
from jaxllm.core.request import Request

FREE = -1


class RowTable:
    """One entry per row; a free row has tenancy -1 and zeros, so it is never due for anything.

    A *tenancy* is one stay of one request in one row. Its number is never used again, so whatever
    a step recorded can be told from what came to the row later.

    Args:
        rank_of: the policy's rank of a request. Rows in order are sorted by it, then by age.
    """

    def __init__(self, num_rows: int, rank_of: Callable[[Request], int] = lambda request: 0):
        self.num_rows = num_rows
        self.rank_of = rank_of
        self.request: Any = np.full(num_rows, None, dtype=object)  # Request | None
        self.request_id: Any = np.full(num_rows, None, dtype=object)  # str | None
        self.tenancy = np.full(num_rows, FREE, dtype=np.int64)
        self.arrival = np.zeros(num_rows, dtype=np.int64)  # Request.arrival_index
        self.rank = np.zeros(num_rows, dtype=np.int64)  # lower goes first
        self.num_computed = np.zeros(
            num_rows, dtype=np.int32
        )  # tokens fed, in-flight steps included
        self.prefill_len = np.zeros(num_rows, dtype=np.int32)  # tokens known when it joined
        self.final_len = np.zeros(num_rows, dtype=np.int32)  # Request.final_len
        self.capacity = np.zeros(num_rows, dtype=np.int32)  # tokens that its blocks hold
        self.needs_events = np.zeros(num_rows, dtype=bool)  # Request.needs_events
        self._free = list(range(num_rows))
        heapify(self._free)
        self._num_tenancies = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_running(self) -> int:
        return self.num_rows - len(self._free)

    def free_rows(self) -> tuple[int, ...]:
        return tuple(self._free)

    def join(self, request: Request, num_computed: int = 0) -> int:
        """Give the request the lowest free row and start a tenancy with that many tokens computed
        already.
        """
        row = heappop(self._free)
        self.request[row] = request
        self.request_id[row] = request.request_id
        self.tenancy[row] = self._num_tenancies
        self.arrival[row] = request.arrival_index
        self.num_computed[row] = num_computed
        self.rank[row] = self.rank_of(request)
        self.prefill_len[row] = request.num_tokens
        self.final_len[row] = request.final_len
        self.needs_events[row] = request.needs_events
        self._num_tenancies += 1
        return row

    def leave(self, row: int) -> None:
        if self.tenancy[row] == FREE:
            raise InvariantError(f"Row {row} is left, but nobody has it.")
        self.request[row] = self.request_id[row] = None
        self.tenancy[row] = FREE
        for column in (self.num_computed, self.prefill_len, self.final_len, self.capacity):
            column[row] = 0
        self.needs_events[row] = False
        heappush(self._free, row)

    def running_rows(self) -> np.ndarray:
        """Rows in use, in order."""
        return self._in_order(np.flatnonzero(self.tenancy != FREE))

    def decoding_rows(self) -> np.ndarray:
        """Rows due to feed their newest sampled token, by number.

        A row whose newest token is its last one by length is not due, even if that token is
        still on the device.
        """
        prefilled = self.num_computed >= self.prefill_len
        return np.flatnonzero(prefilled & (self.num_computed < self.final_len - 1))

    def prefilling_rows(self) -> np.ndarray:
        """Rows with tokens of ``prefill_len`` yet to feed, in order."""
        return self._in_order(np.flatnonzero(self.num_computed < self.prefill_len))

    def crossing_rows(self) -> np.ndarray:
        """Decoding rows whose next token begins a new block, and rows with known tokens that their
        blocks do not hold, in order.
        """
        decoding = self.decoding_rows()
        crossing = decoding[self.num_computed[decoding] >= self.capacity[decoding]]
        rows = np.concatenate((crossing, np.flatnonzero(self.prefill_len > self.capacity)))
        return self._in_order(rows)

    def victims(self) -> np.ndarray:
        """Rows with steps to come, in the order in which to preempt them: highest rank first, of
        equals the newest. The other rows are about to leave anyway.
        """
        due = (self.num_computed < self.prefill_len) | (self.num_computed < self.final_len - 1)
        return self._in_order(np.flatnonzero(due))[::-1]

    def num_to_prefill(self, row: int) -> int:
        """Tokens of ``prefill_len`` yet to feed."""
        return int(self.prefill_len[row] - self.num_computed[row])

    def num_in_flight(self, row: int) -> int:
        """Tokens sampled, or being sampled, on the device that the host has not seen. Negative
        where the host knows more than was fed.
        """
        computed, request = int(self.num_computed[row]), self.request[row]
        if computed < self.prefill_len[row] or request.max_output_tokens == 0:
            return 0
        return computed + 1 - request.num_tokens

    def _in_order(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.lexsort((self.arrival[rows], self.rank[rows]))] if rows.size > 1 else rows
