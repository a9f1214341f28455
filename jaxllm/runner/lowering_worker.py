"""``python -m jaxllm.runner.lowering_worker``: a helper that lowers programs for a device which it
does not use itself. Reads tasks, a line of JSON each, and answers in lines (lowering_helpers.py).
"""

import logging
import os
import sys
import time
from functools import cache
from pathlib import Path

import jax
import msgspec

from jaxllm.attention.backend import AttentionSpec
from jaxllm.attention.select import select_backend
from jaxllm.config.plan import EnginePlan
from jaxllm.models.params import model_def
from jaxllm.runner.lowering_cache import keep_lowered
from jaxllm.runner.lowering_helpers import LoweringAnswer, LoweringTarget, LoweringTask
from jaxllm.runner.program_jobs import Job, ProgramJobs


@cache
def jobs_of(plan: EnginePlan, target: LoweringTarget) -> dict[str, Job]:
    for setting, value in target.settings:
        jax.config.update(setting, value)
    model = model_def(plan.model, plan.dtype, target.kernels)
    backend, _ = select_backend(AttentionSpec.all_of(plan.model), target.attention)
    return {job.name: job for job in ProgramJobs(plan, model, backend, target.kernels).jobs()}


def lower(task: LoweringTask) -> LoweringAnswer:
    """An error is an answer: whoever asked then does it alone."""
    started = time.monotonic()
    try:
        job = jobs_of(task.plan, task.target)[task.name]
        keep_lowered(Path(task.path), job.function, job.args, task.target.jax)
    except Exception as error:
        return LoweringAnswer(0.0, f"{type(error).__name__}: {error}")
    return LoweringAnswer(time.monotonic() - started)


def main() -> int:
    logging.disable()  # the engine says whatever there is to be said
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing else may end up among answers
    for line in sys.stdin.buffer:
        answers.write(msgspec.json.encode(lower(msgspec.json.decode(line, type=LoweringTask))))
        answers.write(b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
