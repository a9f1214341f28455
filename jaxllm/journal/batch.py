"""What the batch looked like at any step: rows, requests, tokens, block tables, from the records.

Knows no scheduler, so it shows what was, also where a replay would decide otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from jaxllm.config.plan import BatchBucket
from jaxllm.journal.file import JournalError, read_journal
from jaxllm.journal.records import Added, Decided, Failed, Fetched, Record, int32s
from jaxllm.journal.replay import read_header


@dataclass
class BatchRow:
    request_id: str
    num_known: int  # tokens the host knew when it joined
    table: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class StepRow:
    row: int
    request_id: str
    start: int  # position of the first token fed
    token_ids: tuple[
        int | None, ...
    ]  # fed; None: it had not reached the host when the journal ends
    table: tuple[int, ...]
    sampled: int | None = None  # None: does not sample, or the result is not in the journal
    samples: bool = False
    finite: bool = True


@dataclass(frozen=True)
class StepView:
    step_id: int
    time: float  # seconds after the journal's beginning
    bucket: BatchBucket
    num_decode_rows: int
    rows: tuple[StepRow, ...]
    new_rows: tuple[int, ...]
    finished_rows: tuple[int, ...]
    ended: str  # "fetched", "failed: ...", "in flight at the end of the journal"


class _Batch:
    """Follows the decisions."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}  # of every request: prompt and sampled, by position
        self.prompt_len: dict[str, int] = {}
        self.rows: dict[int, BatchRow] = {}

    def add(self, record: Added) -> None:
        name, prompt = record.request.request_id, record.request.prompt_token_ids
        self.tokens[name], self.prompt_len[name] = list(prompt), len(prompt)

    def apply(self, step: Decided) -> None:
        for row in step.finished_rows:
            self.rows.pop(row, None)
        for row, name, num_known in step.new_rows:
            self.rows[row] = BatchRow(name, num_known)
            del self.tokens[name][num_known:]  # drawn when it had left; drawn again
        for row, _, block_id in int32s(step.new_blocks).reshape(-1, 3).tolist():
            self.rows[row].table.append(block_id)

    def take(self, rows: tuple[StepRow, ...], result: Fetched) -> None:
        """Sampled tokens by position, also those of requests that have left since. Where one is
        known already, it was forced, and the sampled one is void.
        """
        forced = dict(result.forced)
        token_ids = int32s(result.token_ids).tolist()
        for entry, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
            tokens, position = self.tokens[row.request_id], row.start + len(row.token_ids)
            if row.samples and position == len(tokens):
                tokens += [token_id, *forced.get(entry, ())]

    def rows_of(self, step: Decided) -> tuple[StepRow, ...]:
        columns = (int32s(step.rows), int32s(step.starts), int32s(step.num_new_tokens))
        samples = np.frombuffer(step.samples, bool).tolist()
        shown: list[StepRow] = []
        for row, start, count, does in zip(*(c.tolist() for c in columns), samples, strict=True):
            batch_row = self.rows[row]
            known = self.tokens[batch_row.request_id]
            fed = tuple(known[p] if p < len(known) else None for p in range(start, start + count))
            table = tuple(batch_row.table)
            shown.append(StepRow(row, batch_row.request_id, start, fed, table, samples=does))
        return tuple(shown)


def view_step(path: Path, step_id: int) -> StepView:
    """Step ``step_id``, with its results.

    Raises:
        JournalError: the file is not a whole journal, or has no such step.
    """
    stream = read_journal(path)
    header = read_header(stream, path)
    batch = _Batch()
    in_flight: dict[int, tuple[StepRow, ...]] = {}
    last = -1
    for record in stream:
        if isinstance(record, Added):
            batch.add(record)
        elif isinstance(record, Fetched):
            batch.take(in_flight.pop(record.step_id), record)
        elif isinstance(record, Failed):
            in_flight.clear()
            batch.rows.clear()
        elif isinstance(record, Decided):
            batch.apply(record)
            last, in_flight[record.step_id] = record.step_id, batch.rows_of(record)
            if record.step_id == step_id:
                return _finished_view(header.clock, header.plan.buckets, record, in_flight, stream)
    raise JournalError(f"{path} has no step {step_id}: its last one is {last}.")


def _finished_view(
    began: float,
    buckets: tuple[BatchBucket, ...],
    step: Decided,
    in_flight: dict[int, tuple[StepRow, ...]],
    rest: Iterator[Record],
) -> StepView:
    """Read on for results: of this step, and of the one before, whose tokens it feeds."""
    rows, ended = in_flight[step.step_id], "in flight at the end of the journal"
    for record in rest:
        if isinstance(record, Failed):
            ended = f"failed at {record.where}: {record.error}"
            break
        if not isinstance(record, Fetched):
            continue
        tokens = int32s(record.token_ids).tolist()
        if record.step_id == step.step_id:
            finite = np.frombuffer(record.finite, bool).tolist() or [True] * len(rows)
            rows, ended = _with_results(rows, tokens, finite), "fetched"
            break
        earlier = zip(in_flight[record.step_id], tokens, strict=True)
        rows = _with_fed(rows, {r.request_id: t for r, t in earlier if r.samples})
    return StepView(
        step.step_id,
        step.time - began,
        buckets[step.bucket],
        step.num_decode_rows,
        rows,
        tuple(row for row, _, _ in step.new_rows),
        step.finished_rows,
        ended,
    )


def _with_fed(rows: tuple[StepRow, ...], sampled: dict[str, int]) -> tuple[StepRow, ...]:
    return tuple(
        replace(row, token_ids=(sampled.get(row.request_id),)) if row.token_ids == (None,) else row
        for row in rows
    )


def _with_results(
    rows: tuple[StepRow, ...], tokens: list[int], finite: list[bool]
) -> tuple[StepRow, ...]:
    return tuple(
        replace(row, sampled=token if row.samples else None, finite=ok)
        for row, token, ok in zip(rows, tokens, finite, strict=True)
    )
