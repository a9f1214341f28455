from dataclasses import replace

import numpy as np
import pytest

from jaxllm.core.invariant import InvariantError
from jaxllm.core.scheduler import Scheduler
from jaxllm.core.scheduler_output import NewRow, SchedulerOutput
from jaxllm.engine.executor import ModelRunnerOutput
from jaxllm.engine.step_checks import check_output, check_step
from tests.fakes.plans import VOCAB_SIZE, make_plan, make_request

PLAN = make_plan()


def good_step() -> SchedulerOutput:
    scheduler = Scheduler(PLAN)
    for name in "ab":
        scheduler.add_request(make_request(name, 4))
    step = scheduler.schedule()
    assert step is not None
    return step


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def resumed(token: int) -> NewRow:
    request = make_request()
    return NewRow(0, request, (*request.prompt_token_ids, token))


BAD_STEPS = {
    "row too large": {"rows": ints(0, PLAN.max_num_seqs)},
    "row negative": {"rows": ints(-1, 0)},
    "row twice": {"rows": ints(1, 1)},
    "start negative": {"starts": ints(0, -1)},
    "end beyond the model": {"starts": ints(0, PLAN.max_model_len - 1)},
    "no token": {"num_new_tokens": ints(5, 0)},
    "too many tokens": {"num_new_tokens": ints(15, 15)},
    "null block": {"new_blocks": ((0, 0, 0),)},
    "block too large": {"new_blocks": ((0, 0, PLAN.num_blocks),)},
    "block negative": {"new_blocks": ((0, 0, -1),)},
    "index too large": {"new_blocks": ((0, PLAN.max_blocks_per_row, 1),)},
    "row of block too large": {"new_blocks": ((PLAN.max_num_seqs, 0, 1),)},
    "finished row": {"finished_rows": (PLAN.max_num_seqs,)},
    "new row": {"new_rows": (NewRow(-1, make_request(), (1,)),)},
    "token too large": {"new_rows": (resumed(VOCAB_SIZE),)},
    "token negative": {"new_rows": (resumed(-1),)},
}


def test_good_steps_pass():
    check_step(good_step(), PLAN)
    check_step(replace(good_step(), new_rows=(resumed(VOCAB_SIZE - 1),)), PLAN)


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps_are_refused(name: str):
    with pytest.raises(InvariantError):
        check_step(replace(good_step(), **BAD_STEPS[name]), PLAN)


def good_output(step: SchedulerOutput) -> ModelRunnerOutput:
    return ModelRunnerOutput(step.step_id, ints(0, VOCAB_SIZE - 1), np.ones(2, bool))


def test_good_results_pass():
    step = good_step()
    check_output(step, good_output(step), PLAN)
    output = replace(good_output(step), token_ids=ints(0, -5), finite=np.array((True, False)))
    check_output(step, output, PLAN)  # the token of a failed row says nothing


@pytest.mark.parametrize(
    "change",
    [
        {"step_id": 7},
        {"token_ids": ints(1)},
        {"finite": np.ones(3, bool)},
        {"token_ids": ints(0, VOCAB_SIZE)},
        {"token_ids": ints(-1, 0)},
    ],
)
def test_bad_results_are_refused(change: dict):
    step = good_step()
    with pytest.raises(InvariantError):
        check_output(step, replace(good_output(step), **change), PLAN)
