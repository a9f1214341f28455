"""Frames on the private socket between the HTTP process and the engine process.

Owns the byte format: length (4 bytes), engine generation (4 bytes), one msgpack message; both
numbers big-endian. Knows nothing of what the messages mean. Everything that arrives is checked
against its type before anybody sees it; what does not fit raises an ``IPCError``.
"""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Any

import msgspec

from jaxllm.errors import JaxLLMError
from jaxllm.messages import FromEngine, ToEngine

MAX_FRAME_BYTES = 64 * 1024 * 1024
_HEADER = struct.Struct(">II")
_ENCODER = msgspec.msgpack.Encoder()


class IPCError(JaxLLMError):
    """The two processes do not understand each other. Internal: never the fault of a request."""


class FrameError(IPCError):
    """A frame is too long, is not msgpack, or does not hold a message of the expected type."""


class ChannelClosedError(IPCError):
    """The other process closed its end, which it does by ending."""


def encode_frame(message: Any, generation: int, max_bytes: int = MAX_FRAME_BYTES) -> bytearray:
    """The bytes of one frame.

    Raises:
        FrameError: the message is longer than ``max_bytes``.
    """
    frame = bytearray(_HEADER.size)
    _ENCODER.encode_into(message, frame, _HEADER.size)
    length = len(frame) - _HEADER.size
    _check_length(length, max_bytes)
    _HEADER.pack_into(frame, 0, length, generation)
    return frame


def _check_length(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise FrameError(f"A frame of {length} bytes exceeds the limit of {max_bytes} bytes.")


class MessageDecoder:
    """Decodes payloads into one type, usually a union of messages; other types on request."""

    def __init__(self, kind: Any):
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(kind)

    def __call__(self, payload: bytes | bytearray) -> Any:
        try:
            return self._decoder.decode(payload)
        except (msgspec.MsgspecError, JaxLLMError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"Not a message of the expected type: {error}") from error


class SyncChannel:
    """The engine's end. One thread may receive while another sends; neither may be shared.

    Frames of another generation are dropped: they were meant for a process that is gone.
    """

    def __init__(self, sock: socket.socket, generation: int, max_bytes: int = MAX_FRAME_BYTES):
        sock.setblocking(True)
        self._sock = sock
        self._generation = generation
        self._max_bytes = max_bytes
        self._decode = MessageDecoder(ToEngine)

    def send(self, message: Any) -> None:
        """Raises FrameError (too long; nothing was sent) or ChannelClosedError."""
        frame = encode_frame(message, self._generation, self._max_bytes)
        try:
            self._sock.sendall(frame)
        except OSError as error:
            raise ChannelClosedError(f"The other process is gone: {error}") from error

    def receive(self, kind: Any = None) -> Any:
        """The next message: a ``ToEngine``, or a ``kind`` if given.

        Raises FrameError or ChannelClosedError; after either the channel is of no more use.
        """
        while True:
            length, generation = _HEADER.unpack(self._read(_HEADER.size))
            _check_length(length, self._max_bytes)
            payload = self._read(length)
            if generation == self._generation:
                return self._decode(payload) if kind is None else MessageDecoder(kind)(payload)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                count = self._sock.recv_into(view)
            except OSError as error:
                raise ChannelClosedError(f"The other process is gone: {error}") from error
            if count == 0:
                raise ChannelClosedError("The other process closed the channel.")
            view = view[count:]
        return data

    def close(self) -> None:
        self._sock.close()


class AsyncChannel:
    """The HTTP process's end. Same rules as SyncChannel; ``send`` never waits."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        generation: int,
        max_bytes: int = MAX_FRAME_BYTES,
    ):
        self._reader = reader
        self._writer = writer
        self._generation = generation
        self._max_bytes = max_bytes
        self._decode = MessageDecoder(FromEngine)

    @classmethod
    async def open(
        cls, sock: socket.socket, generation: int, max_bytes: int = MAX_FRAME_BYTES
    ) -> "AsyncChannel":
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer, generation, max_bytes)

    def send(self, message: Any) -> None:
        """Hand the frame to the event loop. Raises FrameError or ChannelClosedError."""
        frame = encode_frame(message, self._generation, self._max_bytes)
        if self._writer.is_closing():
            raise ChannelClosedError("The channel to the engine is closed.")
        self._writer.write(frame)

    async def receive(self) -> FromEngine:
        """The next message. Raises FrameError or ChannelClosedError."""
        while True:
            length, generation = _HEADER.unpack(await self._read(_HEADER.size))
            _check_length(length, self._max_bytes)
            payload = await self._read(length)
            if generation == self._generation:
                return self._decode(payload)

    async def _read(self, size: int) -> bytes:
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise ChannelClosedError("The engine closed the channel.") from error
        except OSError as error:
            raise ChannelClosedError(f"The engine is gone: {error}") from error

    def close(self) -> None:
        self._writer.close()

    async def wait_closed(self, seconds: float) -> None:
        """After ``close``: an engine killed before it had read all leaves an error, which nobody
        else would take."""
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), seconds)
