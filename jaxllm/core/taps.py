"""What a request's taps read, told once. Pure functions over host values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxllm.messages import TapValue
from jaxllm.taps.positions import tapped_between

if TYPE_CHECKING:
    from jaxllm.core.request import Request


def first_owed(request: Request) -> int:
    """The first known position that is tapped and was not told yet: it has to be fed, whatever is
    in the cache. The number of known tokens if there is none.
    """
    params = request.core_request.sampling_params
    if not params.taps:
        return request.num_tokens
    told, known = request.num_tapped, request.num_tokens
    owed = tapped_between(params.tap_positions, request.num_prompt_tokens, told, known)
    return owed[0] if owed else known


def due_taps(request: Request, read: Sequence[TapValue], end: int) -> tuple[TapValue, ...]:
    """Of what a step read that fed the positions before ``end``, all that was not told before a
    preemption.
    """
    told, request.num_tapped = request.num_tapped, max(request.num_tapped, end)
    return tuple(value for value in read if value.position >= told)
