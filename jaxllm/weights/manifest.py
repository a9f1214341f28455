"""MANIFEST.json: the proof that a converted checkpoint is whole and unaltered. No JAX, no Orbax.

Array stores load damaged or foreign data without a word, so nothing opens a checkpoint before its
directory was compared with this file: the exact set of files, their sizes and hashes. The manifest
carries a hash of itself and has one spelling only, so that no byte of it can change unnoticed.
Hashes find damage; they are no signature, and a checkpoint is as trustworthy as its origin.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jaxllm.errors import CheckpointError
from jaxllm.weights.assembly import FLOAT_DTYPES
from jaxllm.weights.json_file import parse_json_object
from jaxllm.weights.sources import TensorInfo

MANIFEST_FILE = "MANIFEST.json"
CONFIG_FILE = "config.json"
FORMAT, VERSION = "jaxllm-checkpoint", 1
MAX_MANIFEST_BYTES = 64 << 20
HASH_THREADS = 8


@dataclass(frozen=True, slots=True)
class FileEntry:
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """``files`` by POSIX path relative to the checkpoint, ``parameters`` by dotted name."""

    files: Mapping[str, FileEntry]
    parameters: Mapping[str, TensorInfo]

    def to_bytes(self) -> bytes:
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "config_sha256": self.files[CONFIG_FILE].sha256,
            "files": {p: {"size": f.size, "sha256": f.sha256} for p, f in self.files.items()},
            "parameters": {
                name: {"shape": list(info.shape), "dtype": info.dtype}
                for name, info in self.parameters.items()
            },
        }
        content["sha256"] = hashlib.sha256(_canonical(content)).hexdigest()
        return _canonical(content)

    @classmethod
    def from_bytes(cls, text: bytes, where: Path) -> "Manifest":
        content = parse_json_object(text, str(where))
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise CheckpointError(
                f"{where} is not of format {FORMAT} version {VERSION}; convert the model again"
            )
        try:
            manifest = cls(
                {_checked_path(p): _file_entry(f) for p, f in content["files"].items()},
                {name: _tensor_info(raw) for name, raw in content["parameters"].items()},
            )
            unaltered = manifest.to_bytes() == text
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where} is malformed: {error!r}") from error
        if not unaltered:
            raise CheckpointError(f"{where} was altered: its own hash does not match")
        return manifest


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True).encode()


def _checked_path(path: str) -> str:
    pure = PurePosixPath(path)
    parts_ok = pure.parts and ".." not in pure.parts and pure.as_posix() == path
    if not parts_ok or pure.is_absolute() or "\\" in path or "\0" in path or path == MANIFEST_FILE:
        raise ValueError(f"the path {path!r} does not lie inside a checkpoint")
    return path


def _file_entry(raw: Any) -> FileEntry:
    size, digest = raw["size"], raw["sha256"]
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise ValueError("a file needs a size and a sha256")
    return FileEntry(size, digest)


def _tensor_info(raw: Any) -> TensorInfo:
    shape, dtype = raw["shape"], raw["dtype"]
    if not all(type(size) is int and 0 <= size < 1 << 40 for size in shape) or len(shape) > 8:
        raise ValueError("a parameter has a malformed shape")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"a parameter has the dtype {dtype!r}")
    return TensorInfo(tuple(shape), dtype)


def list_files(directory: Path) -> dict[str, int]:
    """Size of every regular file below ``directory`` by relative POSIX path.

    Raises CheckpointError for a symbolic link or anything else that is no file or directory.
    """
    found: dict[str, int] = {}
    pending = [directory]
    while pending:
        current = pending.pop()
        with os.scandir(current) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                elif entry.is_file(follow_symlinks=False):
                    size = entry.stat(follow_symlinks=False).st_size
                    found[path.relative_to(directory).as_posix()] = size
                else:
                    raise CheckpointError(f"{path} is neither a regular file nor a directory")
    return found


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(directory: Path, paths: list[str]) -> list[str]:
    with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: hash_file(directory / path), paths))


def build_manifest(directory: Path, parameters: Mapping[str, TensorInfo]) -> Manifest:
    """Describes ``directory`` as it is now; it must not hold a manifest yet."""
    sizes = list_files(directory)
    digests = hash_files(directory, list(sizes))
    entries = zip(sizes.items(), digests, strict=True)
    return Manifest({path: FileEntry(size, digest) for (path, size), digest in entries}, parameters)


def verify_manifest(directory: Path, hashes: bool = True) -> Manifest:
    """The manifest of ``directory``, compared with every file there.

    Names and sizes are always compared, contents unless ``hashes`` is false. Raises
    CheckpointError naming the first difference.
    """
    path = directory / MANIFEST_FILE
    try:
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(
                f"{directory} has no {MANIFEST_FILE}: it is no converted checkpoint, or an "
                "unfinished one; convert the model again"
            )
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes")
        manifest = Manifest.from_bytes(path.read_bytes(), path)
        _compare(directory, manifest, hashes)
    except OSError as error:
        raise CheckpointError(f"cannot read {directory}: {error}") from error
    return manifest


def _compare(directory: Path, manifest: Manifest, hashes: bool) -> None:
    sizes = list_files(directory)
    sizes.pop(MANIFEST_FILE)
    advice = f"; {directory} is damaged, convert the model again"
    for path in sorted(manifest.files.keys() - sizes.keys()):
        raise CheckpointError(f"the file {path} is missing{advice}")
    for path in sorted(sizes.keys() - manifest.files.keys()):
        raise CheckpointError(f"the file {path} does not belong to the checkpoint{advice}")
    for path, entry in manifest.files.items():
        if sizes[path] != entry.size:
            raise CheckpointError(
                f"the file {path} has {sizes[path]} bytes instead of {entry.size}{advice}"
            )
    if hashes:
        paths = list(manifest.files)
        for path, digest in zip(paths, hash_files(directory, paths), strict=True):
            if digest != manifest.files[path].sha256:
                raise CheckpointError(f"the content of {path} was altered{advice}")
