"""Range checks on what goes to the executor and on what comes back, on the host, in production too.

JAX clamps or drops an index out of range and wraps a negative one, so a wrong block id would not
fail: it would corrupt another request's cache.
"""

import numpy as np

from jaxllm.config.plan import EnginePlan
from jaxllm.core.invariant import InvariantError
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.engine.executor import ModelRunnerOutput


def check_step(step: SchedulerOutput, plan: EnginePlan) -> None:
    """Check every row, position, block table entry and token id of a step.

    Prompts were checked when their requests arrived; of a resumed request the output is checked.

    Raises:
        InvariantError: a number is out of range. Always a bug of the scheduler.
    """
    rows, ends = step.rows, step.starts + step.num_new_tokens
    _check("rows", rows, 0, plan.max_num_seqs)
    _check("starts", step.starts, 0, plan.max_model_len)
    _check("num_new_tokens", step.num_new_tokens, 1, step.bucket.num_tokens + 1)
    _check("ends", ends, 1, plan.max_model_len + 1)
    if np.bincount(rows, minlength=1).max() > 1:
        raise InvariantError(f"Step {step.step_id} schedules a row twice.")
    if rows.size > step.bucket.num_rows or step.num_tokens > step.bucket.num_tokens:
        raise InvariantError(f"Step {step.step_id} does not fit into {step.bucket}.")
    if step.new_blocks:
        entries = np.array(step.new_blocks)
        _check("rows of new blocks", entries[:, 0], 0, plan.max_num_seqs)
        _check("block table indices", entries[:, 1], 0, plan.max_blocks_per_row)
        _check("block ids", entries[:, 2], 1, plan.num_blocks)  # the null block is nobody's
    _check_moves(step, plan)
    if step.finished_rows:
        _check("finished rows", np.array(step.finished_rows), 0, plan.max_num_seqs)
    for row, start, token_ids in step.known_tokens:
        _check("rows of known tokens", np.array((row,)), 0, plan.max_num_seqs)
        _check("positions", np.array((start, start + len(token_ids))), 0, plan.max_model_len + 1)
        _check("token ids", np.array(token_ids), 0, plan.model.vocab_size)
    for new in step.new_rows:
        _check("new rows", np.array((new.row,)), 0, plan.max_num_seqs)
        _check("num_computed", np.array((new.num_computed,)), 0, len(new.token_ids))
        output = new.token_ids[len(new.request.prompt_token_ids) :]
        if output:
            _check("token ids", np.array(output), 0, plan.model.vocab_size)


def _check_moves(step: SchedulerOutput, plan: EnginePlan) -> None:
    if not (step.block_saves or step.block_copies or step.block_loads):
        return
    saves, copies, loads = (
        np.array(moves, np.int64).reshape(-1, 2)
        for moves in (step.block_saves, step.block_copies, step.block_loads)
    )
    _check(
        "moved blocks",
        np.concatenate((saves[:, 0], copies.ravel(), loads[:, 1])),
        1,
        plan.num_blocks,
    )
    _check("host slots", np.concatenate((saves[:, 1], loads[:, 0])), 0, plan.host_blocks)


def check_output(step: SchedulerOutput, output: ModelRunnerOutput, plan: EnginePlan) -> None:
    """Check that results have the step's shape and that sampled tokens are in the vocabulary.

    Raises:
        InvariantError: they do not. Always a bug of the executor.
    """
    if output.step_id != step.step_id:
        raise InvariantError(f"Results of step {output.step_id} came for step {step.step_id}.")
    for name in ("token_ids", "finite"):
        shape = getattr(output, name).shape
        if shape != step.rows.shape:
            raise InvariantError(f"{name} has shape {shape}, the step has {step.rows.size} rows.")
    sampled = output.token_ids[step.samples & output.finite]
    _check("sampled token ids", sampled, 0, plan.model.vocab_size)
    entries = [entry for entry, _ in output.forced]
    if len(set(entries)) < len(entries) or not all(ids for _, ids in output.forced):
        raise InvariantError("Forced tokens come twice for a row, or there are none.")
    if entries:
        _check("entries of forced tokens", np.array(entries), 0, step.rows.size)
        ids = np.concatenate([ids for _, ids in output.forced])
        _check("forced token ids", ids, 0, plan.model.vocab_size)


def _check(name: str, values: np.ndarray, low: int, high: int) -> None:
    if values.size and not (low <= values.min() and values.max() < high):
        raise InvariantError(
            f"{name}: {values.min()}..{values.max()} is not within {low}..{high - 1}."
        )
