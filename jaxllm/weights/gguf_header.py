"""The header of a GGUF file: metadata and tensor table, read as hostile input.

Every count and length is checked against the bytes that are really left before anything is
allocated for it, so a few kilobytes can never ask for gigabytes. Tensor data is not touched.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxllm.errors import CheckpointError
from jaxllm.weights.sources import map_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_STRING_BYTES = 16 << 20
MAX_NAME_BYTES = 256
MAX_ITEMS = 4 << 20  # array items in one file; the largest vocabularies need under a million
MAX_TENSORS = 1 << 16
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """``shape`` in numpy order (rows first), ``begin`` and ``end`` in bytes of the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    begin: int
    end: int


class _Cursor:
    """A position in the file that refuses to pass its end."""

    def __init__(self, data: np.ndarray, path: Path):
        self.data = memoryview(data)
        self.path = path
        self.position = 0
        self.items_left = MAX_ITEMS

    def fail(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a usable GGUF file: {reason}")

    def take(self, size: int) -> memoryview:
        end = self.position + size
        if end > len(self.data):
            raise self.fail(f"truncated inside the header at byte {self.position}")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self, limit: int = MAX_STRING_BYTES) -> str:
        length = self.number("Q")
        if length > limit:
            raise self.fail(f"a string of {length} bytes at byte {self.position}")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a string at byte {self.position} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.fail(f"unknown value type {kind} at byte {self.position}")
        dtype = np.dtype(_SCALARS[kind])
        item = np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        return bool(item) if kind == _BOOL else item

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if count > self.items_left:
            raise self.fail(f"an array of {count} items at byte {self.position}")
        self.items_left -= count
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.fail(f"an array of value type {kind} at byte {self.position}")
        dtype = np.dtype(_SCALARS[kind])
        items = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return (items.astype(np.bool_) if kind == _BOOL else items).tolist()


class GGUFHeader:
    """``metadata``, the tensor table ``tensors`` and the mapped file ``data`` (uint8)."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.data = map_file(self.path)
        cursor = _Cursor(self.data, self.path)
        if bytes(cursor.take(4)) != MAGIC:
            raise cursor.fail("wrong magic number")
        version = cursor.number("I")
        if version not in VERSIONS:
            raise cursor.fail(f"version {version}; versions {VERSIONS} are readable")
        num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
        if num_tensors > MAX_TENSORS or num_values > MAX_TENSORS:
            raise cursor.fail(f"{num_tensors} tensors and {num_values} metadata values")
        self.metadata = self._read_metadata(cursor, num_values)
        self.tensors = self._read_tensors(cursor, num_tensors)
        self.header_bytes = cursor.position

    def digest(self) -> str:
        """SHA-256 of the header, which alone determines config and tokenizer."""
        return hashlib.sha256(self.data[: self.header_bytes]).hexdigest()

    @staticmethod
    def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.string(1 << 16)
            if key in metadata:
                raise cursor.fail(f"the metadata key {key!r} appears twice")
            metadata[key] = cursor.value(cursor.number("I"))
        return metadata

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, GGUFTensor]:
        table: dict[str, GGUFTensor] = {}
        for _ in range(count):
            name = cursor.string(MAX_NAME_BYTES)
            if name in table:
                raise cursor.fail(f"tensor {name!r} appears twice")
            table[name] = self._read_entry(cursor, name)
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise cursor.fail(f"alignment {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        end = start
        for name, tensor in sorted(table.items(), key=lambda item: item[1].begin):
            if tensor.begin % alignment or start + tensor.begin < end:
                raise cursor.fail(f"tensor {name!r} overlaps another or is not aligned")
            end = start + tensor.end
            if end > len(self.data):
                raise cursor.fail(f"truncated: tensor {name!r} ends at byte {end}")
            table[name] = GGUFTensor(tensor.shape, tensor.type, start + tensor.begin, end)
        return table

    @staticmethod
    def _read_entry(cursor: _Cursor, name: str) -> GGUFTensor:
        num_dims = cursor.number("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} has {num_dims} dimensions")
        dims = tuple(cursor.number("Q") for _ in range(num_dims))
        code, offset = cursor.number("I"), cursor.number("Q")
        try:
            kind = GGMLQuantizationType(code)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise cursor.fail(f"tensor {name!r} has the unknown type {code}") from error
        if any(not 0 < dim < 1 << 40 for dim in dims) or dims[0] % block:
            raise cursor.fail(f"tensor {name!r} of type {kind.name} has the dimensions {dims}")
        size = math.prod(dims) // block * block_bytes
        return GGUFTensor(tuple(reversed(dims)), kind, offset, offset + size)
