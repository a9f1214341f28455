"""The end of the server's life: which requests still run, and that no new ones begin."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

from jaxllm.errors import EngineDeadError


class Drain:
    """Counts the requests that are being answered. Once begun, none is let in."""

    def __init__(self) -> None:
        self.begun = False
        self.num_requests = 0
        self._none_left = asyncio.Event()
        self._none_left.set()

    def check(self) -> None:
        """Raises EngineDeadError once new requests are not welcome any more."""
        if self.begun:
            raise EngineDeadError("The server is shutting down.")

    def begin(self) -> None:
        self.begun = True

    @contextmanager
    def request(self) -> Generator[None]:
        """Held while a request is answered, up to the last byte."""
        self.num_requests += 1
        self._none_left.clear()
        try:
            yield
        finally:
            self.num_requests -= 1
            if not self.num_requests:
                self._none_left.set()

    async def finish(self) -> None:
        """Waits until no request is left."""
        await self._none_left.wait()
