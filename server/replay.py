"""``jaxllm replay``: decide everything again that a journal holds, or show one step of it."""

import time
from pathlib import Path

from jaxllm.journal.batch import StepRow, StepView, view_step
from jaxllm.journal.records import Decided, int32s
from jaxllm.journal.replay import DecisionDiffersError, Replay, replay

MAX_SHOWN = 8  # tokens and blocks of a row; the rest is counted


def run_replay(path: Path, step_id: int | None) -> int:
    """Print what came of it. Returns 1 if a decision differs, or the scheduler raised.

    Raises:
        JournalError: the file is not a whole journal, or has no such step.
    """
    if step_id is not None:
        print("\n".join(_step_lines(view_step(path, step_id))))
        return 0
    result = replay(path)
    print("\n".join(_replay_lines(result)))
    return 0 if result.difference is None and result.error is None else 1


def _when(wall_time: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall_time))


def _replay_lines(result: Replay) -> list[str]:
    header = result.header
    lines = [
        f"{header.model} by jaxllm {header.jaxllm}, begun {_when(header.wall_time)}",
        f"{result.num_requests} requests, {result.num_steps} steps, {result.num_tokens} tokens, "
        f"{result.num_failures} failed steps",
    ]
    if result.full:
        lines.append("The journal reached its size before the engine's end.")
    if result.unfinished:
        lines.append(f"Unfinished at its end: {_some(result.unfinished)}")
    if result.error is not None:
        lines.append(f"After step {result.num_steps - 1} the scheduler raised {result.error}")
    elif result.difference is None:
        lines.append("Every decision is the same.")
    else:
        lines += _difference_lines(result.difference)
    return lines


def _difference_lines(difference: DecisionDiffersError) -> list[str]:
    then, now = (_decision(d) for d in (difference.then, difference.now))
    either = difference.then or difference.now
    lines = [f"The first decision that differs is step {either.step_id if either else '?'}:"]
    lines.append(f"{'':<16} {'then':<40} now")
    for name in dict.fromkeys((*then, *now)):
        one, other = then.get(name, "no step"), now.get(name, "no step")
        if one != other:
            lines.append(f"{name:<16} {one:<40} {other}")
    return lines


def _decision(record: Decided | None) -> dict[str, str]:
    if record is None:
        return {}
    arrays = ("rows", "starts", "num_new_tokens")
    shown = {name: str(int32s(getattr(record, name)).tolist()) for name in arrays}
    blocks = int32s(record.new_blocks).reshape(-1, 3).tolist()
    plain = ("step_id", "bucket", "num_decode_rows", "new_rows", "finished_rows")
    shown |= {name: str(getattr(record, name)) for name in plain}
    return shown | {"samples": str(list(record.samples)), "new_blocks": str(blocks)}


def _step_lines(view: StepView) -> list[str]:
    lines = [
        f"step {view.step_id} in {view.bucket}, {view.time:.3f} s after the journal's beginning: "
        f"{view.ended}",
        f"{len(view.rows)} rows, the first {view.num_decode_rows} decode; new: "
        f"{_some(view.new_rows) or 'none'}; left before: {_some(view.finished_rows) or 'none'}",
        "",
        f"{'row':>4} {'request':<36} {'start':>6} {'fed':>5} {'sampled':>8}  tokens fed | blocks",
    ]
    return lines + [_row_line(row) for row in view.rows]


def _row_line(row: StepRow) -> str:
    sampled = "NaN" if not row.finite else "-" if row.sampled is None else str(row.sampled)
    tokens = ["?" if token_id is None else token_id for token_id in row.token_ids]
    return (
        f"{row.row:>4} {row.request_id:<36} {row.start:>6} {len(tokens):>5} {sampled:>8}  "
        f"{_some(tokens)} | {_some(row.table)}"
    )


def _some(items: "list[int | str] | list[str] | tuple[int, ...]") -> str:
    more = f" and {len(items) - MAX_SHOWN} more" if len(items) > MAX_SHOWN else ""
    return " ".join(map(str, items[:MAX_SHOWN])) + more
