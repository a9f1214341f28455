"""Fills one step's int32 buffer from the scheduler's plan. NumPy only."""

import numpy as np

from jaxllm.config.plan import BatchKind
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.runner.row_state import RowState
from jaxllm.runner.step_layout import StepLayout


def pack(plan: SchedulerOutput, rows: RowState, layout: StepLayout) -> np.ndarray:
    """The step's buffer, with as many pending patches as fit (the caller makes sure that all
    do).
    """
    buffer = _empty(rows, layout)
    views = layout.views(buffer)
    count = len(plan.rows)
    ends = np.cumsum(plan.num_new_tokens, dtype=np.int32)
    views.rows[:count] = plan.rows
    views.query_start_loc[1 : count + 1] = ends
    views.query_start_loc[count + 1 :] = ends[-1]
    views.seq_lens[:count] = plan.starts + plan.num_new_tokens
    views.logits_index[:count] = ends - 1
    views.samples[:count] = plan.samples
    decode = plan.num_decode_rows
    # Decode rows come first with one token each; token i is slot i.
    views.token_ids[:decode] = -1
    views.positions[:decode] = plan.starts[:decode]
    views.token_slots[:decode] = np.arange(decode)
    if len(views.token_params):
        _pack_token_params(views, plan, rows, ends)
    for slot in range(decode, count):
        _pack_chunk(views, slot, plan, rows, int(ends[slot]))
    views.num_decode_rows[:] = count if layout.bucket.kind is BatchKind.DECODE else decode
    resets, rows.resets = list(dict.fromkeys(rows.resets)), []
    views.reset_rows[: len(resets)] = resets
    take_patches(views, rows)
    return buffer


def pack_idle(rows: RowState, layout: StepLayout) -> np.ndarray:
    """A step that computes nothing and only carries patches."""
    buffer = _empty(rows, layout)
    take_patches(layout.views(buffer), rows)
    return buffer


def pack_targets(plan: SchedulerOutput, rows: RowState, size: int) -> np.ndarray:
    """The token after each fed one, where it is known; for prompt log-probabilities. [N, size]"""
    targets = np.zeros(-(-plan.num_tokens // size) * size, np.int32)
    end = plan.num_decode_rows
    for slot in range(plan.num_decode_rows, len(plan.rows)):
        known, place, count = _chunk(plan, rows, slot)
        following = known[place + 1 : place + count + 1]
        targets[end : end + len(following)] = following
        end += count
    return targets.reshape(-1, size)


def take_patches(views, rows: RowState) -> None:
    index, value = rows.patches.take(len(views.patch_index))
    views.patch_index[: len(index)] = index
    views.patch_value[: len(value)] = value


def _empty(rows: RowState, layout: StepLayout) -> np.ndarray:
    """Padding only: no token, every slot on the scratch row. A fresh buffer each time, because the
    device may still be reading the last one."""
    buffer = np.zeros(layout.size, np.int32)
    views = layout.views(buffer)
    views.positions[:] = -1
    views.rows[:] = rows.scratch_row
    views.reset_rows[:] = rows.scratch_row + 1  # out of range: dropped
    views.patch_index[:] = rows.num_cells  # out of range: dropped
    return buffer


def _pack_token_params(views, plan: SchedulerOutput, rows: RowState, ends: np.ndarray) -> None:
    params = rows.layout.tokens
    by_param = views.token_params.reshape(len(params), -1).view(np.float32)
    by_param[:] = np.stack([np.broadcast_to(param.value(1), 1) for param in params])
    for slot in rows.numbered(plan):
        start, count = int(plan.starts[slot]), int(plan.num_new_tokens[slot])
        for place, numbers in enumerate(rows.numbers(int(plan.rows[slot]))):
            own = numbers[start : start + count]
            begin = int(ends[slot]) - count
            by_param[place, begin : begin + len(own)] = own


def _pack_chunk(views, slot: int, plan: SchedulerOutput, rows: RowState, end: int) -> None:
    known, place, count = _chunk(plan, rows, slot)
    start = int(plan.starts[slot])
    tokens = slice(end - count, end)
    views.token_ids[tokens] = known[place : place + count]
    views.positions[tokens] = np.arange(start, start + count)
    views.token_slots[tokens] = slot


def _chunk(plan: SchedulerOutput, rows: RowState, slot: int) -> tuple[np.ndarray, int, int]:
    """Known tokens of the slot's row, where among them its chunk begins, and how long it is."""
    row = int(plan.rows[slot])
    place = int(plan.starts[slot]) - int(rows.first_known[row])
    return rows.token_ids[row], place, int(plan.num_new_tokens[slot])
