"""Checkpoints in the safetensors format: one file, or shards with an index. No JAX, no torch.

Every header is checked completely against the file before a tensor is handed out: entries must
tile the data section exactly, so a file cut anywhere, or padded, is refused.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.weights.json_file import parse_json_object, read_json_object
from jaxllm.weights.sources import TensorInfo, check_layer_count, map_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int  # bytes from the start of the file
    end: int


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _parse_entry(name: str, raw: object, data_start: int, what: str) -> _Entry:
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: the header entry of {name!r} is malformed")
    dtype = DTYPES.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{what}: tensor {name!r} has the unknown dtype {raw['dtype']!r}")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_size, shape)):
        raise CheckpointError(f"{what}: tensor {name!r} has a malformed shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{what}: tensor {name!r} has malformed data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{what}: tensor {name!r} of shape {tuple(shape)} and dtype {raw['dtype']} cannot "
            f"occupy the bytes {begin}..{end}"
        )
    return _Entry(tuple(shape), dtype, data_start + begin, data_start + end)


class SafetensorsFile:
    """One mapped file. ``entries`` maps names to places that are proven to lie inside the file."""

    def __init__(self, path: Path):
        self.path = path
        self._bytes = map_file(path)
        size = len(self._bytes)
        if size < 8:
            raise CheckpointError(f"{path} is truncated: {size} bytes cannot hold a header")
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file: header of {length} bytes")
        if 8 + length > size:
            raise CheckpointError(f"{path} is truncated inside its header")
        header = parse_json_object(self._bytes[8 : 8 + length].tobytes(), f"header of {path}")
        header.pop("__metadata__", None)
        self.entries = {
            name: _parse_entry(name, raw, 8 + length, str(path)) for name, raw in header.items()
        }
        self._check_tiling(8 + length, size)

    def _check_tiling(self, start: int, size: int) -> None:
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].begin):
            if entry.begin != start:
                raise CheckpointError(f"{self.path}: tensor {name!r} overlaps or leaves a gap")
            start = entry.end
        if start > size:
            raise CheckpointError(
                f"{self.path} is truncated: its header promises {start} bytes, it has {size}"
            )
        if start < size:
            raise CheckpointError(f"{self.path}: {size - start} bytes follow the last tensor")

    def read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        return self._bytes[entry.begin : entry.end].view(entry.dtype).reshape(entry.shape)


def _shard_names(directory: Path) -> dict[str, str]:
    """Tensor name to shard file name, as the index says; every file name is a plain name."""
    path = directory / INDEX_FILE
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for tensor, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors")
        if not plain or "/" in shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(
                f"{path}: {tensor!r} names {shard!r}, which is no shard beside it"
            )
    return weight_map


class SafetensorsSource:
    """A Hugging Face model directory: config.json with model.safetensors or its shards."""

    def __init__(self, directory: Path | str):
        self._directory = Path(directory)
        self.config: dict[str, Any] = read_json_object(self._directory / "config.json")
        if (self._directory / INDEX_FILE).exists():
            self._files = self._open_shards(_shard_names(self._directory))
        elif (self._directory / SINGLE_FILE).exists():
            file = SafetensorsFile(self._directory / SINGLE_FILE)
            self._files = dict.fromkeys(file.entries, file)
        else:
            raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        check_layer_count(self.config, len(self._files), str(self._directory / "config.json"))

    def _open_shards(self, weight_map: dict[str, str]) -> dict[str, SafetensorsFile]:
        files: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(weight_map.values())):
            path = self._directory / shard
            if not path.exists():
                raise CheckpointError(f"the shard {path} named by {INDEX_FILE} is missing")
            file = SafetensorsFile(path)
            for name in file.entries:
                if name in files:
                    raise CheckpointError(f"tensor {name!r} is in two shards, one is {path}")
                if weight_map.get(name) != shard:
                    raise CheckpointError(f"{path} holds {name!r}, which {INDEX_FILE} does not say")
                files[name] = file
        missing = [name for name in weight_map if name not in files]
        if missing:
            raise CheckpointError(
                f"{INDEX_FILE} lists {len(missing)} tensors that are in no shard: {missing[:3]}"
            )
        return files

    def names(self) -> list[str]:
        return list(self._files)

    def info(self, name: str) -> TensorInfo:
        entry = self._file(name).entries[name]
        return TensorInfo(entry.shape, entry.dtype.name)

    def read(self, name: str) -> np.ndarray:
        return self._file(name).read(name)

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._files[name]
        except KeyError:
            raise CheckpointError(f"{self._directory} holds no tensor {name!r}") from None
