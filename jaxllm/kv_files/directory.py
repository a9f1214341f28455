"""A directory of block files: one engine's at a time, bounded in size, the least recently used go.

Raises OSError for whatever the file system says no to; thread-safe.
"""

import fcntl
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from jaxllm.kv_files.block_file import MODE, block_name, file_name

DIRECTORY_MODE = 0o700
KEY_FILE, LOCK_FILE, TEMPORARY = "key", "lock", ".tmp"
KEY_BYTES = 32


class DirectoryInUseError(Exception):
    """Another engine has it."""


class BlockDirectory:
    """Its names are looked up once, when it is opened; nobody else writes into it."""

    def __init__(self, path: Path, max_bytes: int):
        """Raises DirectoryInUseError, or OSError: it cannot be made, read or written."""
        self.path = path
        self._max_bytes = max_bytes
        path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        path.chmod(DIRECTORY_MODE)
        self._guard = threading.Lock()
        self._lock_fd = _lock(path / LOCK_FILE)
        try:
            self.key = _key(path / KEY_FILE)
            self._sizes = _look(path)
            self._num_bytes = sum(self._sizes.values())
            self._make_room(0)
        except OSError:
            self.close()
            raise

    def names(self) -> tuple[bytes, ...]:
        with self._guard:
            return tuple(self._sizes)

    def write(self, name: bytes, parts: Iterable[bytes | memoryview]) -> tuple[bytes, ...]:
        """Write one block's file whole. Returns the names of those that had to go for it."""
        pieces = list(parts)
        size = sum(len(piece) for piece in pieces)
        with self._guard:
            gone = self._make_room(size)
        temporary = self.path / f"{name.hex()}{TEMPORARY}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE)
            with open(fd, "wb", buffering=0) as file:
                for piece in pieces:
                    _write_all(file.fileno(), piece)
            temporary.replace(self.path / file_name(name))
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        with self._guard:
            self._num_bytes += size - self._sizes.get(name, 0)
            self._sizes[name] = size
            self._sizes.move_to_end(name)
        return gone

    def read(self, name: bytes) -> bytes:
        """The file's bytes; it counts as used now. Raises FileNotFoundError when it is gone."""
        path = self.path / file_name(name)
        data = path.read_bytes()
        with suppress(OSError):
            os.utime(path)
        with self._guard:
            if name in self._sizes:
                self._sizes.move_to_end(name)
        return data

    def remove(self, name: bytes) -> None:
        with self._guard:
            self._num_bytes -= self._sizes.pop(name, 0)
        (self.path / file_name(name)).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another engine have it."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _make_room(self, size: int) -> tuple[bytes, ...]:
        gone: list[bytes] = []
        while self._sizes and self._num_bytes + size > self._max_bytes:
            name, freed = self._sizes.popitem(last=False)
            self._num_bytes -= freed
            (self.path / file_name(name)).unlink(missing_ok=True)
            gone.append(name)
        return tuple(gone)


def _lock(path: Path) -> int:
    """The kernel lets go of it when the process ends, however it ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, MODE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise DirectoryInUseError from error
    except OSError:
        os.close(fd)
        raise
    return fd


def _key(path: Path) -> bytes:
    """The directory's own; names and checksums of another key mean nothing here."""
    with suppress(FileNotFoundError):
        key = path.read_bytes()
        if len(key) == KEY_BYTES:
            path.chmod(MODE)
            return key
    key = secrets.token_bytes(KEY_BYTES)
    temporary = path.with_name(path.name + TEMPORARY)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE)
    with open(fd, "wb") as file:
        file.write(key)
    temporary.replace(path)
    return key


def _look(path: Path) -> OrderedDict[bytes, int]:
    """Size by name, the least recently used first. What a killed writer left is removed."""
    found: list[tuple[float, bytes, int]] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.endswith(TEMPORARY):
                Path(entry.path).unlink(missing_ok=True)
            name = block_name(Path(entry.path))
            if name is not None and entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime, name, status.st_size))
    return OrderedDict((name, size) for _, name, size in sorted(found))


def _write_all(fd: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
