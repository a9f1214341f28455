"""Spans: first tokens of a prompt that see each other in both directions (prefix LM).

What is computed for one of them depends on all, so a step feeds what is left of a span whole, and
blocks are shared among requests of the same span only.
"""

from collections.abc import Sequence

from jaxllm.config.model import RowParam
from jaxllm.core.request import Request
from jaxllm.messages import EngineCoreRequest


def span_of(request: EngineCoreRequest, known: Sequence[RowParam]) -> int:
    """Tokens of the longest span that the request asks for; ``known``: what it may bring."""
    brought = request.sampling_params.attention_params or {}
    asked = [brought.get(param.name, 0) for param in known if param.longest is not None]
    return max((int(value) for value in asked if isinstance(value, int | float)), default=0)


def identity_of(request: Request) -> str:
    """Of the span's tokens, for the hashes of blocks."""
    return request.tokens_between(0, request.span).tobytes().hex() if request.span else ""
