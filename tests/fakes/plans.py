"""Small plans and requests for tests of the host side."""

from typing import Any
from zlib import crc32

from jaxllm.messages import EngineCoreRequest
from jaxllm.sampling_params import SamplingParams
from jaxllm.simulation.plans import EOS, VOCAB_SIZE, make_plan, tiny_model

__all__ = ["EOS", "VOCAB_SIZE", "make_plan", "make_request", "tiny_model"]


def make_request(
    request_id: str = "r",
    prompt: tuple[int, ...] | int = 5,
    max_tokens: int = 8,
    *,
    eos: tuple[int, ...] = (),
    priority: int = 0,
    tenant: str = "",
    **params: Any,
) -> EngineCoreRequest:
    """A request; ``prompt`` may be a number of tokens."""
    if isinstance(prompt, int):
        first = crc32(request_id.encode())  # requests have nothing in common unless a test says so
        prompt = tuple((7 * i + first) % VOCAB_SIZE for i in range(prompt))
    params.setdefault("seed", 0)
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=max_tokens, **params),
        max_tokens=max_tokens,
        eos_token_ids=eos,
        priority=priority,
        tenant=tenant,
    )
