"""A beam search over ``EngineClient``, in the place of its ``generate``."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

from jaxllm.errors import RequestFailedError
from jaxllm.frontend.beam_search import BeamSearch, answer_text, next_logprobs, step_params
from jaxllm.frontend.client import EngineClient, Prompt
from jaxllm.frontend.metrics import merged
from jaxllm.outputs import BeamSearchSequence, CompletionOutput, RequestMetrics, RequestOutput
from jaxllm.sampling_params import BeamSearchParams, SamplingParams
from jaxllm.tokenizer.tokenizer import Tokenizer


async def beam_search(
    client: EngineClient,
    beams: BeamSearchParams,
    prompt: Prompt,
    params: SamplingParams,
    *,
    request_id: str,
    **how: Any,
) -> AsyncGenerator[RequestOutput]:
    """Yields one output, at the end: the ``params.n`` best answers.

    ``params`` also says in what form text and log-probabilities are told; ``how`` are
    ``EngineClient.generate``'s other keywords. Leaving early aborts all that runs.

    Raises:
        What ``EngineClient.generate`` raises, for any of the beams.
    """
    step = step_params(
        beams, attention_params=params.attention_params, interventions=params.interventions
    )
    first = await _last(client.generate(prompt, step, request_id=request_id, **how))
    search = BeamSearch(first.prompt_token_ids, beams, client.info)
    search.advance([next_logprobs(first)])
    newest, num_steps = [first], 1
    while search.prompts:
        sources = [
            client.generate(tokens, step, request_id=f"{request_id}-{num_steps}-{beam}", **how)
            for beam, tokens in enumerate(search.prompts)
        ]
        newest = await _together([_last(source) for source in sources])
        search.advance([next_logprobs(output) for output in newest])
        num_steps += 1
    best = search.sequences[: params.n]
    num_prompt_tokens = len(first.prompt_token_ids)
    yield replace(
        first,
        outputs=[
            _completion(index, sequence, num_prompt_tokens, beams, params, client.tokenizer)
            for index, sequence in enumerate(best)
        ],
        metrics=_metrics([first, *newest], sum(len(sequence.logprobs) for sequence in best)),
    )


async def _last(source: Any) -> RequestOutput:
    async with aclosing(cast(AsyncGenerator[RequestOutput], source)) as outputs:
        async for output in outputs:
            if output.finished:
                return output
    raise RequestFailedError("The engine ended a beam without its scores.")


async def _together(
    requests: Sequence[Coroutine[Any, Any, RequestOutput]],
) -> list[RequestOutput]:
    """Their results; when one fails, or nobody waits any more, the others are ended."""
    tasks = [asyncio.create_task(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _completion(
    index: int,
    sequence: BeamSearchSequence,
    num_prompt_tokens: int,
    beams: BeamSearchParams,
    params: SamplingParams,
    tokenizer: Tokenizer,
) -> CompletionOutput:
    token_ids = sequence.tokens[num_prompt_tokens:]
    told = None
    if params.logprobs is not None:
        told = [
            {
                token_id: entry
                for rank, (token_id, entry) in enumerate(position.items())
                if token_id == chosen or rank < params.logprobs
            }
            for chosen, position in zip(token_ids, sequence.logprobs, strict=True)
        ]
    return CompletionOutput(
        index=index,
        text=answer_text(
            tokenizer,
            sequence,
            num_prompt_tokens,
            skip_special_tokens=params.skip_special_tokens,
            include_stop=beams.include_stop_str_in_output,
        ),
        token_ids=token_ids,
        cumulative_logprob=sequence.cum_logprob if params.logprobs is not None else None,
        logprobs=told,
        finish_reason=sequence.finish_reason,
    )


def _metrics(outputs: Sequence[RequestOutput], num_tokens: int) -> RequestMetrics | None:
    """From the first request's beginning to the end of the last ones."""
    records = [output.metrics for output in outputs if output.metrics is not None]
    return replace(merged(records), num_generation_tokens=num_tokens) if records else None
