"""Log-probabilities of a step, cut out for one request. Pure functions over host arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.core.request import Request
from jaxllm.messages import TokenLogprobs

if TYPE_CHECKING:
    from jaxllm.engine.executor import LogprobArrays


def token_logprobs(arrays: LogprobArrays, entry: int, token_id: int, top_k: int) -> TokenLogprobs:
    """Entry ``entry``, which scores the chosen ``token_id``, with the ``top_k`` most likely."""
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(arrays.token_logprobs[entry]),
        rank=int(arrays.ranks[entry]),
        top_ids=tuple(arrays.top_ids[entry, :top_k].tolist()),
        top_logprobs=tuple(arrays.top_logprobs[entry, :top_k].tolist()),
    )


def prompt_logprobs(
    request: Request, arrays: LogprobArrays, offset: int, start: int, num_tokens: int
) -> tuple[TokenLogprobs, ...]:
    """Scores of the prompt's tokens that a chunk brought and that were not sent before.

    The chunk fed positions ``start .. start + num_tokens - 1``; its first entry in ``arrays`` is
    ``offset``. Feeding position p scores the token at p + 1, so a prompt of L tokens has scores
    at positions 1..L-1. Positions computed again after a preemption are left out.
    """
    prompt = request.core_request.prompt_token_ids
    top_k = request.core_request.sampling_params.prompt_logprobs or 0
    first = max(start, request.num_prompt_logprobs)
    last = min(start + num_tokens, len(prompt) - 1)
    return tuple(
        token_logprobs(arrays, offset + fed - start, prompt[fed + 1], top_k)
        for fed in range(first, last)
    )
