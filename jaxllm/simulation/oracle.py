"""What a request must give: the hash model run on it alone, without blocks, rows or batches."""

from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from jaxllm.messages import EngineCoreRequest, TokenLogprobs
from jaxllm.simulation.hash_model import as_context, is_forced, next_tokens, score


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None


def run_alone(request: EngineCoreRequest, vocab_size: int) -> Answer:
    params, answer = request.sampling_params, Answer()
    prompt, tokens = list(request.prompt_token_ids), list(request.prompt_token_ids)
    if params.prompt_logprobs is not None:
        answer.prompt_logprobs = [
            _scored(prompt[:i], prompt[i], params.prompt_logprobs, vocab_size)
            for i in range(1, len(prompt))
        ]
    drawn = next_tokens(prompt, params.seed or 0, vocab_size, forced=is_forced(request))
    for token in islice(drawn, request.max_tokens):
        if params.logprobs is not None:
            answer.logprobs.append(_scored(tokens, token, params.logprobs, vocab_size))
        tokens.append(token)
        answer.token_ids.append(token)
        if len(answer.token_ids) < params.min_tokens:
            continue
        if not params.ignore_eos and token in request.eos_token_ids:
            answer.finish_reason = "stop"
            return answer
        if token in (params.stop_token_ids or ()):
            answer.finish_reason, answer.stop_reason = "stop", token
            return answer
    answer.finish_reason = "length"
    return answer


def _scored(context: list[int], token_id: int, top_k: int, vocab_size: int) -> TokenLogprobs:
    logprob, rank, ids, logprobs = score(as_context(context), token_id, vocab_size)
    logprobs = logprobs.astype(np.float32)[:top_k].tolist()
    logprob = float(np.float32(logprob))
    return TokenLogprobs(token_id, logprob, rank, tuple(ids[:top_k].tolist()), tuple(logprobs))
