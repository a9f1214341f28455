"""A small asyncio HTTP/1.1 client: one request per connection. Knows no JSON and no events.

Enough for benchmarks, and light enough not to be what they measure.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from jaxllm.errors import ConfigError

_READ_BYTES = 64 * 1024
_MAX_HEAD_BYTES = 64 * 1024


class HTTPError(Exception):
    """The answer is not HTTP/1.1, or ends before it should."""


@dataclass(frozen=True, slots=True)
class BaseURL:
    """Where a server's routes begin."""

    host: str
    port: int
    tls: bool
    path: str  # before every route; empty or "/some/where"

    @classmethod
    def parse(cls, url: str, *, flag: str = "--base-url") -> "BaseURL":
        """``flag``: what gave it. A trailing /v1 is dropped: routes bring their own.

        Raises:
            ConfigError: it is not the address of a server.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{flag} {url}: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{flag} {url} is no URL such as http://127.0.0.1:8000.")
        if parts.query or parts.fragment or parts.username is not None:
            raise ConfigError(f"{flag} {url} may hold nothing but scheme, host, port and path.")
        tls = parts.scheme == "https"
        default = 443 if tls else 80
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, default if port is None else port, tls, path)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.tls}://{host}:{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class Response:
    """Status, headers (names in lower case), and the body, which can be read once."""

    status: int
    headers: dict[str, str]
    _reader: asyncio.StreamReader

    async def read(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def parts(self) -> AsyncGenerator[bytes]:
        """The body as it comes. Raises HTTPError when it is cut off."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                async for part in self._chunks():
                    yield part
            elif "content-length" in self.headers:
                left = _number(self.headers["content-length"], 10)
                while left:
                    part = await self._some(min(left, _READ_BYTES))
                    left -= len(part)
                    yield part
            else:
                while part := await self._reader.read(_READ_BYTES):
                    yield part
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise HTTPError("the answer was cut off") from error

    async def _chunks(self) -> AsyncGenerator[bytes]:
        while True:
            line = await self._reader.readuntil(b"\r\n")
            left = _number(line.partition(b";")[0].decode("latin-1").strip(), 16)
            if not left:
                while await self._reader.readuntil(b"\r\n") != b"\r\n":  # trailers
                    pass
                return
            while left:
                part = await self._some(min(left, _READ_BYTES))
                left -= len(part)
                yield part
            await self._reader.readexactly(2)

    async def _some(self, most: int) -> bytes:
        part = await self._reader.read(most)
        if not part:
            raise HTTPError("the answer was cut off")
        return part


@asynccontextmanager
async def request(
    base: BaseURL,
    method: str,
    route: str,
    *,
    headers: dict[str, str] | None = None,
    body: bytes = b"",
) -> AsyncGenerator[Response]:
    """Send a request; the response's body is read inside the ``with``.

    Raises:
        OSError: no connection, or it broke.
        HTTPError: what came back is not HTTP.
    """
    reader, writer = await asyncio.open_connection(
        base.host, base.port, ssl=base.tls or None, limit=_MAX_HEAD_BYTES
    )
    try:
        host = f"[{base.host}]" if ":" in base.host else base.host
        fields = {
            "Host": f"{host}:{base.port}",
            "Connection": "close",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"{method} {base.path}{route} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await writer.drain()
        yield await _read_head(reader)
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> Response:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as error:
        raise HTTPError("the connection was closed without an answer") from error
    except asyncio.LimitOverrunError as error:
        raise HTTPError("the answer's head is too long") from error
    first, *lines = head.split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1."):
        raise HTTPError("what answered does not speak HTTP/1.1")
    try:
        status = _number(rest[:3], 10)
    except ValueError as error:
        raise HTTPError("the answer has no status") from error
    pairs = (line.partition(":") for line in lines if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return Response(status, headers, reader)


def _number(text: str, base: int) -> int:
    """A length on the wire: digits only. Raises ValueError."""
    if not text.isalnum():
        raise ValueError(f"not a number: {text!r}")
    return int(text, base)
