"""What the results of a step change: tokens are taken in, requests end, clients are told.

Columnar where a request got a plain token and goes on; everything else is an event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from jaxllm.core.forced_tokens import append_forced
from jaxllm.core.invariant import InvariantError
from jaxllm.core.logprobs import prompt_logprobs, token_logprobs
from jaxllm.core.request import Request
from jaxllm.core.scheduler_output import SchedulerOutput
from jaxllm.core.stop import check_stop
from jaxllm.core.taps import due_taps
from jaxllm.messages import EngineCoreOutput, StepOutputs, TapValue, TokenLogprobs

if TYPE_CHECKING:
    from jaxllm.core.scheduler import Scheduler
    from jaxllm.engine.executor import ModelRunnerOutput

NOT_FINITE = (
    "The model's logits for this request were not finite numbers (NaN or infinity), or its "
    "parameters (allowed_token_ids, bad_words, min_tokens, structured_outputs) forbid every token."
)


def commit_step(
    scheduler: Scheduler, step: SchedulerOutput, output: ModelRunnerOutput, live: np.ndarray
) -> StepOutputs:
    """Take in one step. ``live`` [n] marks the rows whose request is still the scheduled one."""
    table, rows = scheduler.rows, step.rows
    good = live & output.finite
    # What a row sampled before it knew of forced tokens has its place taken by these.
    drawn = step.samples & (step.starts + step.num_new_tokens >= table.prefill_len[rows])
    forced = dict(output.forced)
    eventful = good & table.needs_events[rows]
    if forced:
        entries = np.fromiter(forced, np.int64)
        eventful[entries] |= (good & drawn)[entries]
    plain = good & drawn & ~eventful
    plain_rows = rows[plain]
    requests: list[Request] = table.request[plain_rows].tolist()
    request_ids: list[str] = table.request_id[plain_rows].tolist()
    token_ids: list[int] = output.token_ids[plain].tolist()

    events: list[EngineCoreOutput] = []
    for row in rows[live & ~output.finite].tolist():
        scheduler.num_corrupted += 1
        events += scheduler.fail(table.request_id[row], NOT_FINITE)
    if eventful.any():
        offsets = np.cumsum(step.num_new_tokens) - step.num_new_tokens
        for entry in np.flatnonzero(eventful).tolist():
            offset, more = int(offsets[entry]), forced.get(entry, ())
            event = _eventful_row(scheduler, step, output, entry, offset, bool(drawn[entry]), more)
            events += [event] if event is not None else []
    may_end = [
        i
        for i, (request, token_id) in enumerate(zip(requests, token_ids, strict=True))
        if request.append(token_id)
    ]
    for i in reversed(may_end):  # from behind: indices stay right while entries are taken out
        event = _end(scheduler, requests[i], (token_ids[i],))
        if event is not None:
            events.append(event)
            del request_ids[i], token_ids[i]
    return StepOutputs(step.step_id, request_ids, token_ids, events)


def _end(
    scheduler: Scheduler,
    request: Request,
    new_token_ids: tuple[int, ...],
    logprobs: tuple[TokenLogprobs, ...] = (),
    prompt: tuple[TokenLogprobs, ...] = (),
    taps: tuple[TapValue, ...] = (),
) -> EngineCoreOutput | None:
    """Finish the request if its newest token says so, and give its last output."""
    end = check_stop(request)
    if end is None:
        return None
    finish_reason, stop_reason = end
    scheduler.finish(request, finish_reason)
    return EngineCoreOutput(
        request.request_id,
        new_token_ids,
        finish_reason,
        stop_reason,
        logprobs,
        prompt,
        taps=taps,
    )


def _eventful_row(
    scheduler: Scheduler,
    step: SchedulerOutput,
    output: ModelRunnerOutput,
    entry: int,
    offset: int,
    drawn: bool,
    forced: tuple[int, ...],
) -> EngineCoreOutput | None:
    """A row that wants more told, ends without a token or gets several; ``offset`` of its first
    token.
    """
    row, start, num_tokens = (int(a[entry]) for a in (step.rows, step.starts, step.num_new_tokens))
    request: Request = scheduler.rows.request[row]
    params = request.core_request.sampling_params
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt: tuple[TokenLogprobs, ...] = ()
    if request.owes_prompt_logprobs:
        arrays = _computed(output.prompt_logprobs, "prompt_logprobs")
        prompt = prompt_logprobs(request, arrays, offset, start, num_tokens)
        request.num_prompt_logprobs += len(prompt)
        scheduler.rows.needs_events[row] = request.needs_events
    taps = due_taps(request, output.taps.get(entry, ()), start + num_tokens)
    if drawn:
        tokens = (int(output.token_ids[entry]),)
        request.append(tokens[0])
        if forced:
            tokens += append_forced(request, forced)
            scheduler.forced.append(request)
        if params.logprobs is not None:
            arrays = _computed(output.logprobs, "logprobs")
            logprobs = (token_logprobs(arrays, entry, tokens[0], params.logprobs),)
    elif start + num_tokens < request.num_tokens:  # not the last chunk
        if not prompt and not taps:
            return None
        return EngineCoreOutput(request.request_id, prompt_logprobs=prompt, taps=taps)
    end = _end(scheduler, request, tokens, logprobs, prompt, taps)
    if end is not None and params.embed:
        embedding = _computed(output.embeddings, "embeddings")[entry]
        return msgspec.structs.replace(end, embedding=embedding.astype("<f4").tobytes())
    return end or EngineCoreOutput(
        request.request_id, tokens, logprobs=logprobs, prompt_logprobs=prompt, taps=taps
    )


def _computed[T](arrays: T | None, name: str) -> T:
    if arrays is None:
        raise InvariantError(
            f"The executor returned no {name}, but a row of the step asked for them."
        )
    return arrays
