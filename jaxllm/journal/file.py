"""The file: frames of length, checksum and one msgpack record. Written to survive the writer."""

import errno
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import msgspec

from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.journal.records import VERSION, Full, Header, Record

logger = logging.getLogger(__name__)

MAGIC = b"jaxllm journal\n"
MODE = 0o600  # it holds prompts and answers
NUM_EARLIER = 3  # journals of earlier engines kept beside it: FILE.1 is the newest
ROOM_FOR_THE_END = 64
MAX_FRAME_BYTES = 64 * 1024 * 1024
_FRAME = struct.Struct("<II")  # length, CRC-32


class JournalError(JaxLLMError):
    """A file that is no journal, or not one that this version reads."""

    exit_code = 2


class JournalWriter:
    """One record is one write to the kernel, so what was written is there when the process is
    killed; a power failure may take the last seconds.

    Trouble with the file ends the recording and is logged; it never reaches the engine.
    """

    def __init__(self, path: Path, header: Header, max_bytes: int):
        """One that exists becomes FILE.1.

        Raises:
            ConfigError: the file cannot be made, or not begun in ``max_bytes``.
        """
        self.path = path
        self._max_bytes = max_bytes
        self._size = 0
        self._encoder = msgspec.msgpack.Encoder()
        begin = MAGIC + self._frame(header)
        if len(begin) + ROOM_FOR_THE_END > max_bytes:
            raise ConfigError(
                f"--journal-max-bytes is {max_bytes:,}: it takes {len(begin) + ROOM_FOR_THE_END:,} "
                "to begin a journal. Give it more."
            )
        try:
            _set_aside(path)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, MODE)
        except OSError as error:
            raise ConfigError(f"--journal {path}: {error.strerror}.") from error
        self._put(begin)

    @property
    def open(self) -> bool:
        return self._fd >= 0

    def write(self, record: Record) -> None:
        if self._fd < 0:
            return
        frame = self._frame(record)
        if self._size + len(frame) + ROOM_FOR_THE_END > self._max_bytes:
            logger.warning("The journal %s is full: recording ends here.", self.path)
            self._put(self._frame(Full(getattr(record, "time", 0.0))))
            self.close()
            return
        self._put(frame)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _frame(self, record: Record) -> bytes:
        payload = self._encoder.encode(record)
        return _FRAME.pack(len(payload), crc32(payload)) + payload

    def _put(self, data: bytes) -> None:
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            logger.error("The journal %s ends here: %s.", self.path, error.strerror)
            self.close()  # a part of a frame may be at its end; nothing may follow that
        self._size += len(data)


def _set_aside(path: Path) -> None:
    for number in range(NUM_EARLIER, 0, -1):
        earlier = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
        if earlier.exists():
            earlier.replace(path.with_name(f"{path.name}.{number}"))


def read_journal(path: Path) -> Iterator[Record]:
    """All whole records; the last one may have been cut off by the end of the writer.

    Raises:
        JournalError: it is not a journal, or of another version.
    """
    decoder = msgspec.msgpack.Decoder(Record)
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise JournalError(f"{path} is not a journal of jaxllm.")
            while True:
                head = file.read(_FRAME.size)
                if len(head) < _FRAME.size:
                    return
                length, checksum = _FRAME.unpack(head)
                if length > MAX_FRAME_BYTES:
                    raise JournalError(f"{path} is damaged: a record of {length} bytes.")
                payload = file.read(length)
                if len(payload) < length:
                    return
                if crc32(payload) != checksum:
                    raise JournalError(f"{path} is damaged at byte {file.tell() - length}.")
                yield decoder.decode(payload)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}.") from error
    except (msgspec.MsgspecError, JaxLLMError) as error:
        if isinstance(error, JournalError):
            raise
        raise JournalError(
            f"{path} was written by a version that this one (format {VERSION}) cannot read: {error}"
        ) from error
