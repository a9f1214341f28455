"""How much work is let in: what the engine runs at once, and a queue of a given length."""

from collections.abc import Generator
from contextlib import contextmanager

from jaxllm.errors import QueueFullError


class AdmissionGate:
    """Counts the sequences (prompts times ``n``) between admission and their end."""

    def __init__(self, max_running: int, max_queued: int | None):
        self._limit = None if max_queued is None else max_running + max_queued
        self.num_admitted = 0

    @contextmanager
    def admit(self, num_sequences: int) -> Generator[None]:
        """Hold a place while the request runs.

        A single request larger than the whole limit is let in when it is alone: waiting would not
        help it.

        Raises:
            QueueFullError: too many wait already.
        """
        after = self.num_admitted + num_sequences
        if self._limit is not None and self.num_admitted and after > self._limit:
            raise QueueFullError(
                "The server is overloaded: too many requests are waiting. Try again later."
            )
        self.num_admitted = after
        try:
            yield
        finally:
            self.num_admitted -= num_sequences
