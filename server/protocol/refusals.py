"""Refusals below the application: the bytes of the answer, and one log line for many of them."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from uuid import uuid4

from jaxllm.errors import JaxLLMError
from server.errors import error_response

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


def refusal(error: JaxLLMError) -> bytes:
    """A whole answer in OpenAI's schema; its sender closes the connection."""
    response = error_response(error, f"req_{uuid4().hex}")
    response.headers["connection"] = "close"
    phrase = HTTPStatus(error.status).phrase
    lines = [f"HTTP/1.1 {error.status} {phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


class RefusalLog:
    """Counts refusals by error code; a flood of them costs one line every ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.counts: Counter[str] = Counter()  # since the start
        self._clock = clock
        self._unsaid: Counter[str] = Counter()
        self._silent_until = 0.0

    def note(self, code: str) -> None:
        self.counts[code] += 1
        self._unsaid[code] += 1
        if self._clock() < self._silent_until:
            return
        self._silent_until = self._clock() + LOG_INTERVAL_S
        parts = ", ".join(f"{count} x {name}" for name, count in sorted(self._unsaid.items()))
        logger.warning("Refused connections since the last such line: %s", parts)
        self._unsaid.clear()
