"""The engine's log-probabilities by id, to the user's by token."""

from jaxllm.messages import TokenLogprobs
from jaxllm.outputs import Logprob, PositionLogprobs
from jaxllm.tokenizer.tokenizer import Tokenizer


def position_logprobs(
    scored: TokenLogprobs, count: int, tokenizer: Tokenizer | None
) -> PositionLogprobs:
    """The chosen token first, then the ``count`` most likely ones in order.

    ``tokenizer`` None: tokens are not decoded.
    """

    def entry(token_id: int, logprob: float, rank: int) -> Logprob:
        decoded = None if tokenizer is None else tokenizer.token_string(token_id)
        return Logprob(logprob, rank, decoded)

    position = {scored.token_id: entry(scored.token_id, scored.logprob, scored.rank)}
    ranked = zip(scored.top_ids[:count], scored.top_logprobs[:count], strict=True)
    for rank, (token_id, logprob) in enumerate(ranked, start=1):
        if token_id not in position:
            position[token_id] = entry(token_id, logprob, rank)
    return position
