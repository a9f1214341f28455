"""OpenAI's error body in Anthropic's form."""

from typing import Any

PATHS = "/v1/messages"  # and below

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def speaks_anthropic(path: str) -> bool:
    return path == PATHS or path.startswith(f"{PATHS}/")


def anthropic_error(error: dict[str, Any], status: int, request_id: str) -> dict[str, Any]:
    """``error`` is OpenAI's error object; its type is one of theirs where the status says none."""
    ours = "invalid_request_error" if 400 <= status < 500 else "api_error"
    param, message = error["param"], error["message"]
    if param is not None and param not in message:  # there is no other place for it
        message = f"{param}: {message}"
    said = {"type": _TYPES.get(status, ours), "message": message}
    return {"type": "error", "error": said, "request_id": request_id}
