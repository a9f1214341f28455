"""A "language model" that is a hash: its next token depends on every token and position before.

Any wrong, stale, missing or foreign entry in the cache changes what comes out.
"""

import struct
from collections.abc import Iterator
from zlib import crc32

import numpy as np

from jaxllm.messages import EngineCoreRequest
from jaxllm.sampling_params import MAX_LOGPROBS

_RANKS = np.arange(MAX_LOGPROBS)
_ENTRY = struct.Struct("=ii")


def next_token(context: np.ndarray, seed: int, vocab_size: int) -> int:
    """``context`` is int32 [n, 2]: token id and position as they were read."""
    return crc32(context.tobytes(), seed & 0xFFFFFFFF) % vocab_size


def score(
    context: np.ndarray, token_id: int, vocab_size: int
) -> tuple[float, int, np.ndarray, np.ndarray]:
    """(logprob, rank, top_ids, top_logprobs) of ``token_id`` after the context."""
    value = crc32(context.tobytes(), token_id)
    top = (value + _RANKS) % vocab_size
    return (
        -(value % 1000) / 64,
        value % vocab_size + 1,
        top,
        -_RANKS / 8 - value % 7,
    )


def as_context(token_ids: list[int]) -> np.ndarray:
    return np.array([(token, position) for position, token in enumerate(token_ids)], np.int32)


def next_tokens(
    prompt: list[int], seed: int, vocab_size: int, *, forced: bool = False
) -> Iterator[int]:
    """All tokens after ``prompt``, each at a cost that does not grow with those before it.
    ``forced``: some as ``forced_tokens`` has it.
    """
    value, position = crc32(as_context(prompt).tobytes(), seed & 0xFFFFFFFF), len(prompt)
    while True:
        drawn = value % vocab_size
        for token in (drawn, *(forced_tokens(position, drawn, vocab_size) if forced else ())):
            yield token
            value, position = crc32(_ENTRY.pack(token, position), value), position + 1


def is_forced(request: EngineCoreRequest) -> bool:
    """Whether its "grammar" forces tokens. Those that are scored are drawn."""
    return bool(request.grammar) and request.sampling_params.logprobs is None


def forced_tokens(position: int, token: int, vocab_size: int) -> tuple[int, ...]:
    """What a "grammar" leaves no choice about behind a token that was drawn at ``position``; often
    nothing.
    """
    value = crc32(_ENTRY.pack(position, token))
    if value % 3:
        return ()
    return tuple((value >> shift) % vocab_size for shift in range(2 + value % 11))
