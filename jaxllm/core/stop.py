"""When a request ends by its own tokens. Stop strings are text and so the frontend's business."""

from jaxllm.core.request import Request


def check_stop(request: Request) -> tuple[str, int | None] | None:
    """(finish_reason, stop_reason) if the newest output token is the last one, else None.

    As in vLLM: an end-of-sequence token gives ("stop", None), one of ``stop_token_ids`` gives
    ("stop", its id), and both wait for ``min_tokens``; ``max_tokens`` and ``max_model_len`` give
    ("length", None) and wait for nothing.
    """
    params = request.core_request.sampling_params
    output = request.output_token_ids
    if output and len(output) >= params.min_tokens:
        if output[-1] in request.core_request.eos_token_ids and not params.ignore_eos:
            return "stop", None
        if output[-1] in (params.stop_token_ids or ()):
            return "stop", output[-1]
    if len(output) >= request.max_output_tokens:
        return "length", None
    return None
