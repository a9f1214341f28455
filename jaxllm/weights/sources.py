"""Where tensors come from. The Protocol that every checkpoint format implements; no JAX.

A source reads names, shapes and dtypes from headers alone, so that a load can be refused before
the first byte of data is touched.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxllm.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and numpy/ml_dtypes name of the dtype that ``read`` returns ("bfloat16")."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """Tensors under their Hugging Face names and the config that goes with them.

    ``read`` returns a read-only view of the mapped file where the format allows it; callers copy
    before they keep it. All methods raise CheckpointError.
    """

    @property
    def config(self) -> dict[str, Any]: ...  # what config.json says

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str) -> np.ndarray: ...


def map_file(path: Path) -> np.ndarray:
    """The file as a read-only uint8 array, mapped, not read. Raises CheckpointError."""
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty")
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def check_layer_count(config: dict[str, Any], num_tensors: int, what: str) -> None:
    """Refuse a config with more layers than the checkpoint has tensors.

    The parameter tree is built from the config before any name is compared, so its size must be
    bounded by something that is really on disk.
    """
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise CheckpointError(f"{what}: num_hidden_layers must be a positive integer")
    if layers > num_tensors:
        raise CheckpointError(
            f"{what}: num_hidden_layers is {layers}, but the checkpoint holds only "
            f"{num_tensors} tensors; a file is missing or the config belongs to another model"
        )
