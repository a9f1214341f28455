"""verify_manifest: every difference between a checkpoint and its manifest is found."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxllm.errors import CheckpointError
from jaxllm.weights.manifest import (
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    build_manifest,
    verify_manifest,
)
from jaxllm.weights.sources import TensorInfo

PARAMETERS = {"a.weight": TensorInfo((2, 3), "bfloat16"), "b": TensorInfo((), "float32")}
FILES = {"config.json": b"{}", "params/a/c/0": bytes(range(200)), "params/a/zarr.json": b"[1]"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "ck"
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    (directory / MANIFEST_FILE).write_bytes(build_manifest(directory, PARAMETERS).to_bytes())
    return directory


def test_round_trip(checkpoint: Path) -> None:
    manifest = verify_manifest(checkpoint)
    assert manifest.parameters == PARAMETERS
    assert {path: entry.size for path, entry in manifest.files.items()} == {
        path: len(content) for path, content in FILES.items()
    }


def test_one_flipped_bit_anywhere(checkpoint: Path) -> None:
    chance = random.Random(0)
    for path in [*FILES, MANIFEST_FILE]:
        content = (checkpoint / path).read_bytes()
        for place in chance.sample(range(8 * len(content)), min(150, 8 * len(content))):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            (checkpoint / path).write_bytes(flipped)
            with pytest.raises(CheckpointError):
                verify_manifest(checkpoint)
        (checkpoint / path).write_bytes(content)
    verify_manifest(checkpoint)


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize("path", [*FILES, MANIFEST_FILE])
def test_removed_cut_grown(checkpoint: Path, path: str, hashes: bool) -> None:
    file = checkpoint / path
    content = file.read_bytes()
    for damaged in (b"", content[:-1], content + b"x"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            verify_manifest(checkpoint, hashes=hashes)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"missing|has no"):
        verify_manifest(checkpoint, hashes=hashes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: (d / "extra").write_bytes(b""), "does not belong"),
        (lambda d: (d / "params/a/c/1").write_bytes(b""), "does not belong"),
        (lambda d: (d / "link").symlink_to("/etc/passwd"), "neither a regular file"),
        (lambda d: (d / "dir").symlink_to("/etc"), "neither a regular file"),
        (lambda d: os.mkfifo(d / "pipe"), "neither a regular file"),
        (
            lambda d: (d / "config.json").unlink() or (d / "config.json").symlink_to("/dev/zero"),
            "neither a regular file",
        ),
    ],
)
def test_additions(checkpoint: Path, change: Callable[[Path], Any], reason: str) -> None:
    change(checkpoint)
    with pytest.raises(CheckpointError, match=reason):
        verify_manifest(checkpoint, hashes=False)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "", ".", "a\\b", MANIFEST_FILE]
)
def test_paths_outside(checkpoint: Path, path: str) -> None:
    entry = FileEntry(0, "0" * 64)
    manifest = Manifest({"config.json": entry, path: entry}, PARAMETERS)
    (checkpoint / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    with pytest.raises(CheckpointError, match="malformed"):
        verify_manifest(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.__setitem__("version", 2),
        lambda m: m.__setitem__("format", "other"),
        lambda m: m.pop("files"),
        lambda m: m.__setitem__("files", []),
        lambda m: m["files"].pop("config.json"),
        lambda m: m["files"]["config.json"].__setitem__("size", -1),
        lambda m: m["files"]["config.json"].__setitem__("size", True),
        lambda m: m["files"]["config.json"].__setitem__("sha256", 5),
        lambda m: m["parameters"]["b"].__setitem__("shape", "x"),
        lambda m: m["parameters"]["b"].__setitem__("shape", [-1]),
        lambda m: m["parameters"]["b"].__setitem__("shape", [1.0]),
        lambda m: m["parameters"]["b"].__setitem__("shape", [1 << 50]),
        lambda m: m["parameters"]["b"].__setitem__("shape", 4),
        lambda m: m["parameters"]["b"].__setitem__("dtype", "object"),
        lambda m: m["parameters"]["b"].__setitem__("dtype", ["x"]),
        lambda m: m.__setitem__("parameters", {"b": None}),
    ],
)
def test_malformed(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
    change(content)
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        verify_manifest(checkpoint)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no converted checkpoint"):
        verify_manifest(tmp_path / "nowhere")
