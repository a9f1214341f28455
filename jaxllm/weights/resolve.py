"""From the name a user typed to files on this machine. Knows formats by their names only."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxllm.config.env import cache_dir
from jaxllm.errors import CheckpointError, ModelUnavailableError
from jaxllm.weights import default_model
from jaxllm.weights.atomic_directory import atomic_directory
from jaxllm.weights.manifest import MANIFEST_FILE
from jaxllm.weights.model_sources import check_source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
ALLOWED_FILES = ["*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt"]
_TOKENIZER_FORMAT = 1  # of what gguf_tokenizer.py makes of a header; its files are kept
SUBFOLDERS = ["*/*"]  # "original/" and the like hold second copies in other formats


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """``path``: a directory, or the file for kind "gguf". ``name``: what clients call it."""

    path: Path
    kind: Literal["hf", "converted", "gguf"]
    tokenizer_dir: Path
    name: str


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    allowed_sources: Sequence[str] = (),
) -> ModelFiles:
    """Find ``model``: a directory, a .gguf file, the default model's name, or a Hub repository.

    A local path wins over a Hub name. ``revision`` is the Hub's branch, tag or commit; ``offline``
    uses what was downloaded before; ``allowed_sources`` are as in ``check_source``. Raises
    ModelUnavailableError saying what to do, or CheckpointError for a place that holds no model.
    """
    if not model or "\0" in model:
        raise ModelUnavailableError("The model's name is empty or holds a NUL character")
    check_source(model, allowed_sources)
    if model == default_model.NAME:
        return _default_model(model, offline)
    path = Path(model).expanduser()
    if path.exists():
        return _local(path)
    if model.endswith(".gguf") or model.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(model):
        raise ModelUnavailableError(
            f"{model!r} does not exist on this machine and is no Hub repository of the form "
            f"'organisation/name'. Name a model directory, a .gguf file, a repository, or "
            f"{default_model.NAME!r}"
        )
    try:
        return _local(download(model, revision, offline), name=model)
    except ModelUnavailableError:
        if model != default_model.HUB_NAME or revision is not None or allowed_sources:
            raise
        return _default_model(model, offline)


def _default_model(name: str, offline: bool) -> ModelFiles:
    path = default_model.default_model_dir(offline=offline)
    return ModelFiles(path, "converted", path, name)


def _local(path: Path, name: str | None = None) -> ModelFiles:
    name = name or path.absolute().name
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{path} is a file, but no .gguf file; name the model's directory"
            )
        return ModelFiles(path, "gguf", _gguf_tokenizer_dir(path), name.removesuffix(".gguf"))
    if (path / MANIFEST_FILE).exists():
        return ModelFiles(path, "converted", path, name)
    if (path / "config.json").is_file():
        return ModelFiles(path, "hf", path, name)
    raise CheckpointError(f"{path} holds neither {MANIFEST_FILE} nor config.json: it is no model")


def _gguf_tokenizer_dir(path: Path) -> Path:
    """The tokenizer of a GGUF file, extracted into the cache once per content of its header."""
    from jaxllm.weights.gguf_header import GGUFHeader
    from jaxllm.weights.gguf_tokenizer import tokenizer_files

    header = GGUFHeader(path)
    directory = cache_dir() / "gguf_tokenizers" / f"{_TOKENIZER_FORMAT}-{header.digest()}"
    if not directory.is_dir():
        files = tokenizer_files(header)
        try:
            with atomic_directory(directory) as work:
                for file_name, content in files.items():
                    (work / file_name).write_bytes(content)
        except CheckpointError:
            if not directory.is_dir():  # otherwise another process was faster
                raise
    return directory


def download(repository: str, revision: str | None, offline: bool) -> Path:
    """The Hub's snapshot of ``repository``: weights and text files, never code or pickles."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    advice = (
        "Download it on a connected machine and name its directory here, or use "
        f"{default_model.NAME!r}"
    )
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                local_files_only=offline,
                allow_patterns=ALLOWED_FILES,
                ignore_patterns=SUBFOLDERS,
            )
        )
    except LocalEntryNotFoundError as error:
        reason = "was not downloaded before" if offline else "cannot be downloaded: no connection"
        raise ModelUnavailableError(f"{repository} {reason}. {advice}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ModelUnavailableError(
            f"The Hub refuses {repository} (HTTP {status}): check name and revision, and log in "
            f"with `hf auth login` if it is private or gated. {advice}"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(
            f"{repository} cannot be downloaded ({type(error).__name__}). {advice}"
        ) from error
