"""JSON files of a checkpoint, read as hostile input. Knows no schema.

A model directory may come from anywhere, so the reader is stricter than ``json.load``: a size
limit before reading, no duplicate keys (two readers would disagree), no NaN, no deep nesting.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from jaxllm.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the same key appears twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """The object in ``text``. Raises CheckpointError naming ``what`` for anything else."""
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_object,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must hold a JSON object")
    return value


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in the file ``path``, at most ``max_bytes`` long. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(text) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes")
    return parse_json_object(text, str(path))
