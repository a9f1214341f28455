"""What a connection may say: framing on which two servers could differ, sizes, order."""

import json
import logging
import socket
from collections.abc import Iterator

import pytest

from server.errors import HeadTooLargeError
from server.protocol.head import head_error
from server.protocol.limits import ConnectionLimits
from server.protocol.refusals import LOG_INTERVAL_S, RefusalLog
from tests.server.echo_app import EchoApp
from tests.server.wire import Answer, connect, hung_up, read_answer, request, running, say

LIMITS = ConnectionLimits(max_body_bytes=1000, head_timeout_s=2, body_timeout_s=10, linger_s=1)
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, EchoApp, RefusalLog]]:
    app, refusals = EchoApp(), RefusalLog()
    with running(app, LIMITS, refusals) as port:
        yield port, app, refusals


@pytest.fixture
def port(server: tuple[int, EchoApp, RefusalLog]) -> int:
    return server[0]


@pytest.fixture
def app(server: tuple[int, EchoApp, RefusalLog]) -> EchoApp:
    server[1].seen.clear()
    return server[1]


@pytest.fixture
def refusals(server: tuple[int, EchoApp, RefusalLog]) -> RefusalLog:
    server[2].counts.clear()
    return server[2]


def echo(answer: Answer) -> list[object]:
    """Method, path, body size and header names as the application saw them."""
    assert answer.status == 200
    return json.loads(answer.body)


def post(*fields: str, body: bytes = b"") -> bytes:
    return request("/", *fields, method="POST", body=body)


MALFORMED = {
    "two lengths": post("Content-Length: 2", "Content-Length: 2", body=b"ab"),
    "two different lengths": post("Content-Length: 2", "Content-Length: 3", body=b"abc"),
    "a list of lengths": post("Content-Length: 2, 2", body=b"ab"),
    "a signed length": post("Content-Length: +2", body=b"ab"),
    "a negative length": post("Content-Length: -2", body=b"ab"),
    "an endless length": post(f"Content-Length: {'9' * 30}"),
    "no length": post("Content-Length: ", body=b"ab"),
    "length and chunks": post("Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"),
    "chunks and length": post(CHUNKED, "Content-Length: 5", body=b"0\r\n\r\n"),
    "compressed chunks": post("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "chunks twice": post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"),
    "hidden chunks": post("Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"),
    "identity": post("Transfer-Encoding: identity", body=b"0\r\n\r\n"),
    "chunks in 1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk too large to count": post(CHUNKED, body=b"FFFFFFFFFFFFFFFFF\r\n"),
    "a chunk size in another form": post(CHUNKED, body=b"0x1\r\na\r\n0\r\n\r\n"),
    "a chunk size with a sign": post(CHUNKED, body=b"+1\r\na\r\n0\r\n\r\n"),
    "chunks with bare line feeds": post(CHUNKED, body=b"1\na\n0\n\n"),
    "a chunk that goes on": post(CHUNKED, body=b"1\r\nab\r\n0\r\n\r\n"),
    "two hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "an empty host": b"GET / HTTP/1.1\r\nHost: \r\n\r\n",
    "a host that is a path": request(host="x/docs?"),
    "a host with a user": request(host="a@b"),
    "bare line feeds": b"GET / HTTP/1.1\nHost: x\n\n",
    "one bare line feed": b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n",
    "a bare carriage return": b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n",
    "a folded line": b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n",
    "a line without colon": b"GET / HTTP/1.1\r\nHost: x\r\nABC\r\n\r\n",
    "a name of nothing": b"GET / HTTP/1.1\r\nHost: x\r\n: v\r\n\r\n",
    "a name with brackets": b"GET / HTTP/1.1\r\nHost: x\r\nA(b): v\r\n\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n",
    "escape in a value": b"GET / HTTP/1.1\r\nHost: x\r\nA: \x1b[31m\r\n\r\n",
    "NUL in the target": b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "UTF-8 in the target": "GET /é HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "a space in the target": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target that is no URL": b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET / HTTP/0.9\r\n\r\n",
    "HTTP/2": b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "a method in lower case": b"get / HTTP/1.1\r\nHost: x\r\n\r\n",
    "an unknown method": b"FROB / HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
    "noise": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_requests(port: int, app: EchoApp, refusals: RefusalLog, data: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(data)
        answer = read_answer(connection)
        assert hung_up(connection)
    assert answer.status == 400
    assert (answer.error["type"], answer.error["code"]) == (
        "invalid_request_error",
        "malformed_http",
    )
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert not app.seen
    assert refusals.counts == {"malformed_http": 1}


TOO_LARGE = {
    "a claimed body": (413, post("Content-Length: 1001")),
    "a body in chunks": (413, post(CHUNKED, body=b"64\r\n" + b"a" * 100 + b"\r\n") * 1
        + (b"64\r\n" + b"a" * 100 + b"\r\n") * 10),
    "framing without a body": (413, post(CHUNKED, body=b"1;" + b"x" * 16000 + b"\r\na\r\n") + (
        b"1;" + b"x" * 16000 + b"\r\na\r\n") * 40),
    "endless trailers": (413, post(CHUNKED, body=b"0\r\n") + b"A: b\r\n" * 20000),
    "a long field": (431, b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 40000),
    "a long field that ends": (431, request("/", "A: " + "a" * 40000)),
    "a long name": (431, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a" * 40000),
    "a long target": (431, b"GET /" + b"a" * 40000),
    "many fields": (431, request("/", *["A: b"] * 100)),
    "endless fields": (431, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5000),
}  # fmt: skip


@pytest.mark.parametrize(("status", "data"), TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_too_large(port: int, app: EchoApp, status: int, data: bytes) -> None:
    with connect(port) as connection:
        for start in range(0, len(data), 1000):  # as a network would deliver it
            try:
                connection.sendall(data[start : start + 1000])
            except OSError:
                break
        answer = read_answer(connection)
        assert hung_up(connection)
    assert answer.status == status
    assert answer.error["code"] == ("request_too_large" if status == 413 else "headers_too_large")
    assert not app.seen


def test_a_head_that_comes_as_a_whole_is_measured_too() -> None:
    fields = [(b"host", b"x"), (b"a", b"b" * LIMITS.max_head_bytes)]
    assert isinstance(head_error("1.1", b"/", fields, LIMITS), HeadTooLargeError)
    assert head_error("1.1", b"/", fields[:1], LIMITS) is None


def test_exactly_at_the_limits(port: int) -> None:
    assert echo(say(port, request("/", *["A: b"] * 98 + ["A: " + "a" * 30000])))
    assert echo(say(port, post(body=b"a" * 1000)))[2] == 1000
    ones = b"1\r\na\r\n" * 1000 + b"0\r\n\r\n"
    assert echo(say(port, post(CHUNKED, body=ones)))[2] == 1000
    zeros = "Content-Length: " + "0" * 5000 + "3"
    assert echo(say(port, post(zeros, body=b"abc")))[2] == 3


def test_a_body_that_was_refused_is_still_listened_to(port: int) -> None:
    """A client that writes all before it reads would otherwise see a reset, not the reason."""
    body = b"a" * 8_000_000
    assert say(port, post(body=body)).error["code"] == "request_too_large"


def test_requests_one_after_the_other(port: int, app: EchoApp) -> None:
    with connect(port) as connection:
        for size in (0, 1, 1000):
            connection.sendall(post(body=b"a" * size))
            assert echo(read_answer(connection))[2] == size
            connection.sendall(b"\r\n")  # tolerated, as it always was
    assert len(app.seen) == 3


def test_requests_at_once_are_not_read(port: int, app: EchoApp) -> None:
    with connect(port) as connection:
        connection.sendall(request("/1") + request("/2") * 1000)
        answer = read_answer(connection)
        assert hung_up(connection)
    assert echo(answer)[1] == "/1"
    assert answer.headers["connection"] == "close"
    assert app.seen == ["/1"]


def test_noise_after_a_request_does_not_cost_its_answer(port: int) -> None:
    assert echo(say(port, request("/1") + b"noise\r\n\r\n"))[1] == "/1"


@pytest.mark.parametrize("path", ["/late", "/large"])
def test_a_client_that_has_said_all_is_answered(port: int, path: str) -> None:
    """As netcat's does, which closes its half of the connection behind the request."""
    for fields in ((), ("Connection: close",)):
        with connect(port) as connection:
            connection.sendall(request(path, *fields))
            connection.shutdown(socket.SHUT_WR)
            assert echo(read_answer(connection))[1] == path
            assert hung_up(connection)


def test_a_client_that_ends_inside_its_request_is_not(port: int, app: EchoApp) -> None:
    for data in (b"GET / HTTP/1.1\r\n", post("Content-Length: 5", body=b"abc")):
        with connect(port) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    assert not app.seen


def test_a_flood_after_a_request_ends_the_connection(port: int, app: EchoApp) -> None:
    with connect(port) as connection:
        connection.sendall(request("/hold"))
        try:
            for _ in range(100):
                connection.sendall(b"x" * 10000)
        except OSError:
            pass
        assert hung_up(connection)


@pytest.mark.parametrize("cut", [0, 20, 90, 200])
def test_proposals_to_speak_something_else_are_not_heard(port: int, app: EchoApp, cut: int) -> None:
    """As Java's client makes them, with a body that must not be lost."""
    data = request(
        "/", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEA",
        "Content-Length: 9", method="POST", body=b"ninebytes",
    )  # fmt: skip
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(data[:cut])
            connection.sendall(data[cut:])
            method, _, size, names = echo(read_answer(connection))
            assert (method, size) == ("POST", 9)
            assert isinstance(names, list) and "upgrade" not in names
    answer = say(port, request("/ws", "Connection: Upgrade", "Upgrade: websocket"))
    assert echo(answer)[1] == "/ws"


def test_trailers_join_no_headers(port: int) -> None:
    body = b"1\r\na\r\n0\r\nAuthorization: Bearer x\r\n\r\n"
    names = echo(say(port, post(CHUNKED, body=body)))[3]
    assert names == ["host", "transfer-encoding"]


def test_an_answer_before_the_body(port: int, app: EchoApp) -> None:
    with connect(port) as connection:
        connection.sendall(request("/early", "Content-Length: 10", method="POST"))
        assert echo(read_answer(connection))[1] == "/early"
        connection.sendall(b"0123456789" + request("/next"))
        assert echo(read_answer(connection))[1] == "/next"


def test_expectations(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(post("Expect: 100-continue", "Content-Length: 3"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        assert echo(read_answer(connection))[2] == 3
    refused = say(port, post("Expect: 100-continue", "Content-Length: 3000"))
    assert refused.status == 413


def test_http_1_0(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /old HTTP/1.0\r\n\r\n")
        assert echo(read_answer(connection))[1] == "/old"
        assert hung_up(connection)


def test_a_flood_of_refusals_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    refusals = RefusalLog()
    with running(EchoApp(), LIMITS, refusals) as port:
        for _ in range(50):
            assert say(port, b"noise\r\n").status == 400
    assert refusals.counts == {"malformed_http": 50}
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert [line for line in lines if "malformed_http" in line] == [
        "Refused connections since the last such line: 1 x malformed_http"
    ]
    assert not [line for line in lines if "Invalid HTTP" in line or "pgrade" in line]


def test_what_was_not_said_is_said_later(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    log = RefusalLog(clock=lambda: now)
    for code in ("a", "b", "a"):
        log.note(code)
    now += LOG_INTERVAL_S
    log.note("a")
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "1 x a",
        "2 x a, 1 x b",
    ]
    assert log.counts == {"a": 3, "b": 1}
