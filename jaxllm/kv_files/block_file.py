"""One KV block in one file: what it holds, and whether it is whole and ours.

Magic and version, the length of the header (uint16, little-endian), the header (JSON: whose block
it is, dtype, shape, name), 32 bytes of BLAKE2b over header and contents, keyed with the directory's
key, then the contents. A file is written under another name and renamed, so a killed writer leaves
no half of a block under its name; what a power failure or a bad disk leaves, the checksum tells.
"""

import json
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

MAGIC = b"jaxllm kv block 1\n"
SUFFIX = ".kv"
DIGEST_BYTES = 32
MODE = 0o600


class DamagedBlockError(Exception):
    """Not the whole block that its name says, or of another model."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What all blocks of an engine have in common."""

    key: bytes
    identity: str  # of the model, its weights and all else that keys and values depend on
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Of a file, near enough to plan with."""
        return len(self._begin(bytes(16))) + DIGEST_BYTES + self._content_bytes

    @property
    def _content_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def _begin(self, name: bytes) -> bytes:
        header = {
            "identity": self.identity,
            "dtype": self.dtype.name,
            "shape": self.shape,
            "name": name.hex(),
        }
        text = json.dumps(header, sort_keys=True).encode()
        return MAGIC + struct.pack("<H", len(text)) + text

    def _digest(self, begin: bytes, content: memoryview) -> bytes:
        digest = blake2b(begin, key=self.key, digest_size=DIGEST_BYTES)
        digest.update(content)
        return digest.digest()

    def pack(self, name: bytes, content: np.ndarray) -> list[bytes | memoryview]:
        """The file's parts, in order."""
        data = memoryview(np.ascontiguousarray(content).view(np.uint8).reshape(-1))
        begin = self._begin(name)
        return [begin, self._digest(begin, data), data]

    def unpack(self, name: bytes, data: bytes) -> np.ndarray:
        """Raises DamagedBlockError."""
        begin = self._begin(name)
        content = memoryview(data)[len(begin) + DIGEST_BYTES :]
        if not data.startswith(begin) or len(content) != self._content_bytes:
            raise DamagedBlockError("another model's, of another version, or cut off")
        if data[len(begin) : len(begin) + DIGEST_BYTES] != self._digest(begin, content):
            raise DamagedBlockError("its checksum is wrong")
        return np.frombuffer(content, np.uint8).view(self.dtype).reshape(self.shape)


def file_name(name: bytes) -> str:
    return name.hex() + SUFFIX


def block_name(path: Path) -> bytes | None:
    """None: no block's file."""
    try:
        name = bytes.fromhex(path.name.removesuffix(SUFFIX))
    except ValueError:
        return None
    return name if path.name == file_name(name) else None
