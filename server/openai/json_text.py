"""JSON from outside: strict, and no deeper than what we are ready to walk through."""

from typing import Any

import pydantic_core

from jaxllm.errors import InvalidRequestError

MAX_DEPTH = 64  # of arrays and objects in one another


def parse_json(text: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no lone surrogates, bounded depth.

    Raises:
        InvalidRequestError: it is not that; the message speaks of the request's body.
    """
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        message = f"We could not parse the JSON body of your request: {error}."
        raise InvalidRequestError(message, code="invalid_json") from None
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH:  # else it cannot be that deep
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise InvalidRequestError(
        f"The JSON body of your request is nested more than {MAX_DEPTH} levels deep.",
        code="invalid_json",
    )
