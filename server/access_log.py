"""One line per request on the logger ``jaxllm.access``, as JSON or as key=value text.

Whatever a client can write is escaped to printable ASCII, so that no line can be forged and no
terminal told what to do.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from server.record import RequestRecord

MAX_NAME = 128  # characters of a model's name

logger = logging.getLogger("jaxllm.access")


class AccessLog:
    """Called with the record of each request that has ended."""

    def __init__(self, style: str):
        self._as_json = style == "json"

    def __call__(self, record: RequestRecord) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        line = fields(record)
        logger.info("%s", escaped(line) if self._as_json else as_text(line))


def fields(record: RequestRecord) -> dict[str, Any]:
    """Without those that mean nothing for this request. Times are in seconds; of several prompts
    the longest.
    """
    started = datetime.fromtimestamp(record.started_ns / 1e9, UTC)
    line: dict[str, Any] = {
        "time": started.isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "total_s": round(record.seconds, 6),
        "tenant": record.tenant or None,
        "model": record.model[:MAX_NAME] if record.model is not None else None,
        "error": record.error,
    }
    if record.prompts:
        line |= {
            "prompt_tokens": record.num_prompt_tokens,
            "cached_tokens": record.num_cached_tokens,
            "output_tokens": record.num_output_tokens,
            "queue_s": _rounded(record.longest("queue_time")),
            "prefill_s": _rounded(record.longest("prefill_time")),
            "decode_s": _rounded(record.longest("decode_time")),
            "first_token_s": _rounded(record.longest("first_token_latency")),
            "finish_reasons": record.finish_reasons,
        }
    return {name: value for name, value in line.items() if value is not None}


def as_text(line: dict[str, Any]) -> str:
    return " ".join(f"{name}={escaped(value)}" for name, value in line.items())


def escaped(value: Any) -> str:
    """JSON in printable ASCII: it knows no other way to write a control character."""
    return json.dumps(value, separators=(",", ":")).replace("\x7f", "\\u007f")


def start_logging(style: str) -> None:
    """Lines go to standard error as they are, whatever the level of other logs."""
    logger.propagate = False
    logger.setLevel(logging.CRITICAL if style == "off" else logging.INFO)
    logger.handlers[:] = [logging.StreamHandler(sys.stderr)]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
