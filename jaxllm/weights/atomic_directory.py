"""A directory that appears whole under its name, or not at all. Knows nothing of what is inside.

It is filled as ``NAME.tmp-<pid>`` beside its destination, flushed to disk and renamed once. The
writer holds a lock on its directory, so what a dead process left behind is told from work in
progress, also when process ids were reused or belong to another container.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxllm.errors import CheckpointError


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Flush every file and directory below and including ``directory``."""
    for folder, _, files in os.walk(directory, topdown=False):
        for name in files:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


def _lock(directory: Path, *, wait: bool) -> int | None:
    """A descriptor that locks ``directory``; None when gone, or locked and not ``wait``."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            return descriptor
    except OSError:
        pass  # locked by its writer, or removed while this process waited
    os.close(descriptor)
    return None


def remove_stale(destination: Path) -> None:
    """Remove what dead processes left beside ``destination``; undo a replacement cut in two."""
    for leftover in sorted(destination.parent.glob(f"{destination.name}.*-*")):
        kind = leftover.name.removeprefix(f"{destination.name}.").partition("-")[0]
        if kind not in ("tmp", "old"):
            continue
        descriptor = _lock(leftover, wait=False)
        if descriptor is None:
            continue
        try:
            if kind == "old" and not destination.exists():
                leftover.rename(destination)
            else:
                shutil.rmtree(leftover, ignore_errors=True)
        finally:
            os.close(descriptor)


def _make_locked(temporary: Path) -> int:
    while True:
        temporary.mkdir()
        descriptor = _lock(temporary, wait=True)
        if descriptor is not None:
            return descriptor


def _swap_in(temporary: Path, destination: Path, *, replace: bool) -> None:
    """One rename. A predecessor is moved aside: no rename replaces a filled directory."""
    old = destination.with_name(f"{destination.name}.old-{os.getpid()}")
    if replace and destination.exists():
        os.rename(destination, old)
    try:
        os.rename(temporary, destination)
    except OSError:
        if old.exists() and not destination.exists():
            os.rename(old, destination)
        raise
    fsync_path(destination.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_directory(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields the directory to fill; it becomes ``destination`` when the block ends without error.

    Raises CheckpointError when ``destination`` exists and ``replace`` is false, also when another
    process finished it meanwhile. On any exception the work is removed.
    """
    destination = destination.absolute()
    if not replace and os.path.lexists(destination):
        raise CheckpointError(f"{destination} exists; choose another place or use --force")
    destination.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(destination)
    temporary = destination.with_name(f"{destination.name}.tmp-{os.getpid()}")
    try:
        descriptor = _make_locked(temporary)
    except FileExistsError as error:
        raise CheckpointError(f"{temporary} exists: {destination} is being written") from error
    try:
        yield temporary
        fsync_tree(temporary)
        try:
            _swap_in(temporary, destination, replace=replace)
        except OSError as error:
            raise CheckpointError(f"cannot move the result to {destination}: {error}") from error
    finally:
        with suppress(OSError):
            os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)
