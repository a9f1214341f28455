"""What the engine core needs of whoever keeps KV blocks in files."""

from collections.abc import Iterable
from typing import Protocol

from jaxllm.core.disk_tier import DiskNews


class BlockFiles(Protocol):
    """Nothing here waits for a disk, but ``wait``."""

    def take(self) -> DiskNews | None:
        """What has happened since the last call; None: nothing."""
        ...

    def read(self, reads: Iterable[tuple[bytes, int]]) -> None:
        """Begin to read blocks, each (name, slot of the host's memory it is for)."""
        ...

    def wait(self, seconds: float) -> None:
        """Until ``take`` has something to tell, but no longer."""
        ...

    def ending(self) -> bool:
        """Before each time that blocks are written because the engine ends: waits until the disk
        keeps up. False: there is no time left for it, of what begins with the first call, or there
        are no files any more.
        """
        ...

    def close(self) -> None: ...


class NoBlockFiles:
    """For engines without."""

    def take(self) -> DiskNews | None:
        return None

    def read(self, reads: Iterable[tuple[bytes, int]]) -> None:
        return None

    def wait(self, seconds: float) -> None:
        return None

    def ending(self) -> bool:
        return False

    def close(self) -> None:
        return None
