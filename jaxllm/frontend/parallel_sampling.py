"""``n`` completions of one prompt: the engine sees ``n`` requests, the user one."""

from dataclasses import replace

import msgspec

from jaxllm.messages import EngineCoreRequest


def fan_out(request: EngineCoreRequest, n: int) -> tuple[EngineCoreRequest, ...]:
    """One engine request per completion, with seeds ``seed + index``.

    Prompt log-probabilities are the same for all, so only the first asks for them.
    """
    params = request.sampling_params
    children: list[EngineCoreRequest] = []
    for index in range(n):
        child = params.child(index)
        if index > 0 and child.prompt_logprobs is not None:
            child = replace(child, prompt_logprobs=None)
        children.append(
            msgspec.structs.replace(
                request,
                request_id=child_id(request.request_id, index, n),
                sampling_params=child,
            )
        )
    return tuple(children)


def child_id(request_id: str, index: int, n: int) -> str:
    """The engine's name for the ``index``-th completion; the request's own when there is one."""
    return request_id if n == 1 else f"{index}_{request_id}"
