"""One step's buffer, field by field."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxllm.config.plan import BatchBucket, BatchKind
from jaxllm.core.scheduler_output import NewRow, SchedulerOutput
from jaxllm.messages import EngineCoreRequest
from jaxllm.runner.packing import pack, pack_idle, pack_targets
from jaxllm.runner.row_layout import RowLayout
from jaxllm.runner.row_state import RowState
from jaxllm.runner.step_layout import StepLayout
from tests.fakes.tiny_engine import request

MIXED, DECODE = BatchBucket(12, 4, BatchKind.MIXED), BatchBucket(4, 4, BatchKind.DECODE)


def row_state(**requests: EngineCoreRequest) -> RowState:
    """Requests in rows 0, 1, ...; the scratch row is 4."""
    state = RowState(RowLayout(4), max_num_seqs=4, vocab_size=96)
    for row, item in enumerate(requests.values()):
        state.apply(step(MIXED, [], [], [], new_rows=(NewRow(row, item, item.prompt_token_ids),)))
    return state


def step(
    bucket: BatchBucket, rows: list[int], starts: list[int], counts: list[int], **changes: Any
) -> SchedulerOutput:
    return SchedulerOutput(
        step_id=0,
        bucket=bucket,
        rows=np.array(rows, np.int32),
        starts=np.array(starts, np.int32),
        num_new_tokens=np.array(counts, np.int32),
        samples=changes.pop("samples", np.ones(len(rows), np.bool_)),
        num_decode_rows=changes.pop("num_decode_rows", 0),
        **changes,
    )


def packed(plan: SchedulerOutput, state: RowState) -> SimpleNamespace:
    layout = StepLayout(plan.bucket, block_size=16)
    return layout.views(pack(plan, state, layout))


def test_decode_row_chunk_and_padding_side_by_side() -> None:
    state = row_state(a=request("a", [1]), b=request("b", [2]), c=request("c", range(50, 60)))
    plan = step(MIXED, [1, 2], [7, 3], [1, 4], num_decode_rows=1, samples=np.array([True, False]))
    views = packed(plan, state)
    assert views.token_ids.tolist() == [-1, 53, 54, 55, 56, *[0] * 7]
    assert views.positions.tolist() == [7, 3, 4, 5, 6, *[-1] * 7]
    assert views.token_slots[:5].tolist() == [0, 1, 1, 1, 1]
    assert pack_targets(plan, state, 4).tolist() == [[0, 54, 55, 56], [57, 0, 0, 0]]
    assert views.rows.tolist() == [1, 2, 4, 4]
    assert views.query_start_loc.tolist() == [0, 1, 5, 5, 5]
    assert views.seq_lens.tolist() == [8, 7, 0, 0]
    assert views.logits_index[:2].tolist() == [0, 4]
    assert views.samples.tolist() == [1, 0, 0, 0]
    assert views.num_decode_rows == 1


def test_a_chunk_that_fills_its_bucket_and_ends_its_prompt() -> None:
    state = row_state(a=request("a", range(20, 32)))
    plan = step(MIXED, [0], [0], [12])
    views = packed(plan, state)
    assert views.token_ids.tolist() == list(range(20, 32))
    assert views.positions.tolist() == list(range(12))
    assert pack_targets(plan, state, 12).tolist() == [[*range(21, 32), 0]]
    assert views.query_start_loc.tolist() == [0, 12, 12, 12, 12]


def test_a_prompt_of_one_token_is_served_by_the_decode_form() -> None:
    state = row_state(a=request("a", [9]), b=request("b", [8, 7]))
    views = packed(step(DECODE, [1, 0], [1, 0], [1, 1], num_decode_rows=1), state)
    assert views.token_ids.tolist() == [-1, 9, 0, 0]
    assert views.token_slots[:2].tolist() == [0, 1]
    assert views.num_decode_rows == 2


def test_an_idle_step_computes_nothing_and_carries_what_fits() -> None:
    state = row_state(a=request("a", [1], logit_bias={i: 1.0 for i in range(96)}))
    layout, pending = StepLayout(DECODE, block_size=16), len(state.patches)
    assert pending > layout.max_patches
    views = layout.views(pack_idle(state, layout))
    assert len(state.patches) == pending - layout.max_patches
    assert (views.positions == -1).all() and not views.samples.any()
    assert views.num_decode_rows == 0
    assert (views.rows == state.scratch_row).all()
    assert ((views.patch_index >= 0) & (views.patch_index < state.num_cells)).all()
    views = layout.views(pack_idle(state, layout))
    assert len(state.patches) == 0
    assert (views.patch_index == state.num_cells).any(), "unused patches point nowhere"


@pytest.mark.parametrize(("start", "scored"), [(0, True), (2, True), (3, False), (9, False)])
def test_prompts_are_scored_only_while_they_are_fed(start: int, scored: bool) -> None:
    state = row_state(a=request("a", [1, 2, 3, 4], prompt_logprobs=0))
    plan = step(DECODE, [0], [start], [1], num_decode_rows=int(start > 3))
    assert state.scores_prompts(plan) == scored


def test_resets_are_told_once() -> None:
    state = row_state(a=request("a", [1], presence_penalty=1.0))
    plan = step(MIXED, [0], [0], [1])
    views = packed(plan, state)
    nowhere = state.scratch_row + 1
    assert views.reset_rows.tolist() == [0] + [nowhere] * (len(views.reset_rows) - 1)
    assert set(packed(plan, state).reset_rows.tolist()) == {nowhere}
