"""A real server in a thread, and connections that say exactly what a test wants said."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

import uvicorn

from server.protocol.http import http_protocol
from server.protocol.limits import ConnectionLimits
from server.protocol.refusals import RefusalLog


def listening() -> socket.socket:
    """On any free port. The protocol is named, or asyncio would leave Nagle's algorithm on."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    return listener


@contextmanager
def running(
    app: Any,
    limits: ConnectionLimits | None = None,
    refusals: RefusalLog | None = None,
    *,
    send_buffer: int | None = None,
) -> Iterator[int]:
    """The port on which ``app`` is served behind the guard. ``send_buffer``: the kernel's."""
    protocol = http_protocol(limits or ConnectionLimits(), refusals or RefusalLog())
    config = uvicorn.Config(
        app,
        log_config=None,
        ws="none",
        loop="asyncio",  # as in `serve`; "auto" would find uvloop
        http=protocol,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with listening() as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object; whatever else fails the test."""
        body = json.loads(self.body)
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return body["error"]


def connect(port: int, timeout: float = 5.0, *, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(timeout)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", port))
    return connection


def read_answer(connection: socket.socket, method: str = "GET") -> Answer:
    response = HTTPResponse(connection, method=method)
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def say(port: int, *parts: bytes, method: str = "GET") -> Answer:
    """The first answer to ``parts``, sent one after the other on a connection of their own."""
    with connect(port) as connection:
        for part in parts:
            connection.sendall(part)
        return read_answer(connection, method)


def hung_up(connection: socket.socket) -> bool:
    """Whether the other side closes before the connection's timeout."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def request(
    target: str = "/", *fields: str, method: str = "GET", body: bytes = b"", host: str = "x"
) -> bytes:
    """A request as text, with a Content-Length where there is a body of unsaid length."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *fields]
    if body and not any(field.lower().startswith(("content-l", "transfer")) for field in fields):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body
