"""Keeps what may have killed the engine twice from killing it again. Knows contents, no requests.

Requests are never replayed: whoever was waiting is told at once and may ask again. Clients do so by
themselves, so that one request that kills the engine would kill the next ones too.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from jaxllm.errors import RequestFailedError
from jaxllm.sampling_params import SamplingParams

MAX_DEATHS = 2
MEMORY_S = 300.0  # after the last death
MAX_CONTENTS = 4096

# Prompt and parameters, as the user gave them: a seed that was drawn does not count.
Content = tuple[Sequence[int], SamplingParams]


class PoisonGuard:
    """Remembers what was running when the engine died.

    What was running at ``MAX_DEATHS`` deaths, without ever having come to its end in between, is
    refused for ``MEMORY_S``. Most of it will have been innocent company; it is named as such.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._deaths: dict[bytes, int] = {}  # by fingerprint
        self._forget_at = 0.0

    def check(self, content: Content) -> None:
        """Raises RequestFailedError for what is refused."""
        if self._remembers() and self._deaths.get(_fingerprint(content), 0) >= MAX_DEATHS:
            raise RequestFailedError(
                f"The engine died {MAX_DEATHS} times while this request was running. That may have "
                f"been another request's fault, but to be safe it is not run again for "
                f"{MEMORY_S / 60:.0f} minutes."
            )

    def died(self, running: Iterable[Content]) -> None:
        """The engine died while these were running."""
        if not self._remembers():
            self._deaths.clear()
        for fingerprint in {_fingerprint(content) for content in running}:
            if fingerprint in self._deaths or len(self._deaths) < MAX_CONTENTS:
                self._deaths[fingerprint] = self._deaths.get(fingerprint, 0) + 1
        self._forget_at = self._clock() + MEMORY_S

    def finished(self, content: Content) -> None:
        """It came to its end, so it is harmless."""
        if self._remembers():
            self._deaths.pop(_fingerprint(content), None)

    def _remembers(self) -> bool:
        """Costs nothing as long as nothing died."""
        return bool(self._deaths) and self._clock() < self._forget_at


def _fingerprint(content: Content) -> bytes:
    encoded = msgspec.msgpack.encode(content)
    return hashlib.blake2b(encoded, digest_size=16).digest()
