"""Refuses requests that could harm or wedge a step, before they are queued.

The frontend checks the same and more, but here is the last place before numbers become indices:
an index out of range does not crash a device, it silently reads or writes something else.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxllm.config.model import RowParam
from jaxllm.errors import ContextLengthExceededError, InvalidRequestError
from jaxllm.messages import EngineCoreRequest
from jaxllm.taps.check import check_taps
from jaxllm.taps.sites import TapShapes


def validate_request(
    request: EngineCoreRequest,
    vocab_size: int,
    max_model_len: int,
    *,
    embeddings: bool = False,
    attention_params: Sequence[RowParam] = (),
    taps: TapShapes | None = None,
) -> None:
    """Check what the engine relies on. ``vocab_size`` is the width of the logits; ``embeddings``:
    are there programs for them? ``attention_params``: what a request may bring. ``taps``: what
    the model has to read and change, None where there are no programs for it.

    Raises:
        InvalidRequestError: a field is out of range; ``param`` names it.
        ContextLengthExceededError: prompt and output do not fit into ``max_model_len``.
    """
    params = request.sampling_params
    if not -(2**63) <= request.priority < 2**63:
        raise InvalidRequestError(
            f"priority must fit into 64 bits, got {request.priority}.", param="priority"
        )
    if not request.prompt_token_ids:
        raise InvalidRequestError("The prompt holds no tokens.", param="prompt")
    if params.n != 1:
        raise InvalidRequestError(
            f"The engine completes one sequence per request, got n={params.n}.", param="n"
        )
    if params.seed is None:
        raise InvalidRequestError("The engine needs a request's seed to be set.", param="seed")
    if params.embed and (not embeddings or request.max_tokens != 0):
        raise InvalidRequestError(
            "An embedding needs max_tokens=0 and an engine with embeddings enabled.", param="embed"
        )
    num_tokens = len(request.prompt_token_ids)
    check_attention_params(params.attention_params or {}, attention_params, num_tokens)
    _check_length(request, max_model_len)
    thoughts = request.thoughts
    if thoughts is not None and not (
        all(thoughts.closings)
        and thoughts.closings
        and thoughts.opening_ids
        and thoughts.closing_ids
        and (thoughts.budget is None or thoughts.budget >= 0)
    ):
        raise InvalidRequestError("Thoughts have no end.", param="thinking_token_budget")
    check_taps(params, len(request.prompt_token_ids), request.max_tokens, taps)
    for param, ids in (
        ("prompt", request.prompt_token_ids),
        ("eos_token_ids", request.eos_token_ids),
        ("stop_token_ids", params.stop_token_ids or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", tuple(params.logit_bias or ())),
        ("thoughts", () if thoughts is None else thoughts.opening_ids + thoughts.closing_ids),
        ("thoughts", () if thoughts is None else thoughts.after_ids),
        *(("bad_words", word) for word in request.bad_words_token_ids),
    ):
        _check_token_ids(param, ids, vocab_size)
    if not all(request.bad_words_token_ids):
        raise InvalidRequestError("bad_words must not hold an empty word.", param="bad_words")


def check_attention_params(
    given: Mapping[str, float | Sequence[float]], known: Sequence[RowParam], prompt_len: int
) -> None:
    """Raises InvalidRequestError for names and shapes that the engine's variants do not declare,
    and for spans of the prompt that it cannot feed in one step."""
    declared = {param.name: param for param in known}
    for name, value in given.items():
        param = declared.get(name)
        if param is None:
            names = ", ".join(declared) or "none"
            raise _wrong_param(
                name, f"is none that this engine's attention takes; it takes: {names}"
            )
        numbers = list(value) if isinstance(value, Sequence) else [value]
        if param.per_token:
            if not isinstance(value, Sequence) or len(numbers) > prompt_len:
                raise _wrong_param(
                    name,
                    "must be a list with a number for each of the prompt's first tokens, of which "
                    f"there are {prompt_len}",
                )
            continue
        if isinstance(value, Sequence) != (param.size is not None) or (
            param.size not in (None, len(numbers))
        ):
            wanted = "one number" if param.size is None else f"a list of {param.size} numbers"
            raise _wrong_param(name, f"must be {wanted}")
        if param.whole and not all(float(number).is_integer() for number in numbers):
            raise _wrong_param(name, "must hold whole numbers")
        if param.longest is not None and not 0 <= numbers[0] <= min(param.longest, prompt_len):
            raise _wrong_param(
                name,
                f"must be from 0 to {min(param.longest, prompt_len)}: the prompt has {prompt_len} "
                f"tokens, and the engine feeds up to {param.longest} of one request in a step (for "
                "more, start it with a larger --max-num-batched-tokens)",
            )


def _wrong_param(name: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"attention_params: {name!r} {reason}.", param="attention_params", code="invalid_value"
    )


def _check_length(request: EngineCoreRequest, max_model_len: int) -> None:
    prompt_len, max_tokens = len(request.prompt_token_ids), request.max_tokens
    if max_tokens < 0:
        raise InvalidRequestError(
            f"max_tokens must not be negative, got {max_tokens}.", param="max_tokens"
        )
    if prompt_len + max_tokens > max_model_len:
        raise ContextLengthExceededError(
            f"The prompt has {prompt_len} tokens and max_tokens is {max_tokens}, together more "
            f"than max_model_len ({max_model_len}). Shorten the prompt or ask for fewer.",
            param="prompt" if prompt_len >= max_model_len else "max_tokens",
        )


def _check_token_ids(param: str, ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        return
    try:
        array = np.asarray(ids)
    except ValueError:  # sequences of unequal length
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu":  # numbers beyond 64 bits make objects
        raise InvalidRequestError(f"{param} must hold token ids.", param=param)
    if array.min() < 0 or array.max() >= vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequestError(
            f"{param} holds token id {wrong}; the model's ids are 0..{vocab_size - 1}.", param=param
        )
