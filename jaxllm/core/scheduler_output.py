"""What the scheduler tells the executor about one step: a diff by row, columnar.

A row is a request's permanent place in the batch, from admission until it finishes or is
preempted. A resumed request is a new row like any other.
"""

from dataclasses import dataclass, field

import numpy as np

from jaxllm.config.plan import BatchBucket
from jaxllm.messages import EngineCoreRequest


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request enters the batch. ``token_ids`` is everything known: prompt, and output after a
    preemption. Keys and values of the first ``num_computed`` are in its blocks already.
    """

    row: int
    request: EngineCoreRequest
    token_ids: tuple[int, ...]
    num_computed: int = 0


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """What the scheduler must remember of a step until its results are here."""

    step_id: int
    tenancies: np.ndarray  # int64 [n], aligned with the rows of the step


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step. The arrays are aligned: entry i is the i-th scheduled row; decode rows come first.

    A row whose last scheduled token is its newest one (``samples``) yields a token. In a decode
    the fed token may still be on the device: the executor feeds what it sampled for that row last.
    """

    step_id: int
    bucket: BatchBucket
    rows: np.ndarray  # int32 [n]
    starts: np.ndarray  # int32 [n]; position of the first token fed = tokens computed before
    num_new_tokens: np.ndarray  # int32 [n]
    samples: np.ndarray  # bool [n]; False for a prefill chunk that is not the last
    num_decode_rows: (
        int  # the first that many entries feed one token that was sampled on the device
    )
    new_rows: tuple[NewRow, ...] = ()
    new_blocks: tuple[tuple[int, int, int], ...] = ()  # (row, index in its block table, block id)
    # (row, position of the first, token ids) that were found to be the only ones possible, and are
    # fed like a prompt's; from the first that has not been fed yet
    known_tokens: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    # Contents to be moved before the step writes anything, in this order and each at once:
    block_saves: tuple[tuple[int, int], ...] = ()  # (block, slot of the host's memory)
    block_copies: tuple[tuple[int, int], ...] = ()  # (from, to)
    block_loads: tuple[tuple[int, int], ...] = ()  # (slot, block)
    block_writes: tuple[tuple[int, bytes], ...] = ()  # (index in block_saves, name): to a file, too
    # rows left since the last step; their state may be forgotten
    finished_rows: tuple[int, ...] = ()
    request_ids: tuple[str, ...] = field(default=())  # for logs and errors, aligned with rows

    @property
    def num_tokens(self) -> int:
        return int(self.num_new_tokens.sum())
