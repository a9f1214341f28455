"""Clients that are slow, silent, greedy or many."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from server.protocol import http as protocol
from server.protocol.limits import ConnectionLimits
from server.protocol.refusals import RefusalLog
from tests.server.echo_app import EchoApp
from tests.server.test_live import wait_until
from tests.server.wire import connect, hung_up, read_answer, request, running, say

pytestmark = pytest.mark.alone

LIMITS = ConnectionLimits(
    head_timeout_s=0.4, body_timeout_s=0.4, write_timeout_s=0.4, linger_s=0.4, max_connections=600
)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, EchoApp, RefusalLog]]:
    app, refusals = EchoApp(), RefusalLog()
    with running(app, LIMITS, refusals, send_buffer=8192) as port:
        yield port, app, refusals


@pytest.fixture
def port(server: tuple[int, EchoApp, RefusalLog]) -> int:
    return server[0]


@pytest.fixture
def app(server: tuple[int, EchoApp, RefusalLog]) -> EchoApp:
    server[1].seen.clear()
    server[1].gone = 0
    return server[1]


@pytest.fixture
def refusals(server: tuple[int, EchoApp, RefusalLog]) -> RefusalLog:
    server[2].counts.clear()
    return server[2]


def test_heads_that_do_not_end(port: int) -> None:
    starts = (b"G", b"\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(port)) for _ in starts]
        for connection, start in zip(connections, starts, strict=True):
            connection.sendall(start)
        for connection in connections:
            answer = read_answer(connection)
            assert (answer.status, answer.error["code"]) == (408, "request_timeout")
            assert hung_up(connection)


def test_bodies_that_do_not_end(port: int, app: EchoApp) -> None:
    def post(field: str, body: bytes = b"") -> bytes:
        return request("/", field, method="POST", body=body)

    starts = (
        post("Content-Length: 10"),
        post("Content-Length: 10", b"123456789"),
        post("Transfer-Encoding: chunked", b"1\r\na\r\n"),
        post("Transfer-Encoding: chunked", b"0\r\nA: b\r\n"),
    )
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(port)) for _ in starts]
        for connection, start in zip(connections, starts, strict=True):
            connection.sendall(start)
        for connection in connections:
            answer = read_answer(connection)
            assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    wait_until(lambda: app.gone == len(starts))
    assert not app.seen


@pytest.mark.parametrize(
    "start", [b"GET /", request("/", "Transfer-Encoding: chunked", method="POST")]
)
def test_a_byte_now_and_then_wins_no_time(port: int, start: bytes) -> None:
    with connect(port, timeout=0.05) as connection:
        connection.sendall(start)
        started = time.monotonic()
        while time.monotonic() - started < 10.0:
            try:
                connection.sendall(b"1\r\na\r\n" if b"chunked" in start else b"a")
                if not connection.recv(1000):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 0.3 < time.monotonic() - started < 8.0


def test_silence_is_hung_up_on_without_a_word(port: int, refusals: RefusalLog) -> None:
    with connect(port) as connection:
        assert connection.recv(100) == b""
    assert not refusals.counts


def test_the_next_request_has_as_much_time(port: int) -> None:
    with connect(port) as connection:
        for _ in range(3):
            connection.sendall(request("/")[:-2])
            time.sleep(0.15)
            connection.sendall(b"\r\n")
            assert read_answer(connection).status == 200
        connection.sendall(b"GET")
        assert read_answer(connection).status == 408


def test_an_answered_request_whose_body_does_not_end(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(request("/early", "Content-Length: 10", method="POST"))
        assert read_answer(connection).status == 200
        assert connection.recv(1000) == b""  # there is nobody to tell


def test_a_long_answer_is_not_a_slow_request(port: int, app: EchoApp) -> None:
    with connect(port, timeout=0.9) as connection:
        connection.sendall(request("/hold"))
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert app.num_holding == 1
    wait_until(lambda: app.num_holding == 0)


# Readers


def test_who_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    buffered: list[int] = []  # what waits for the client each time a writer is told to wait

    class Watched(protocol.GuardedProtocol):
        def pause_writing(self) -> None:
            super().pause_writing()
            buffered.append(self.transport.get_write_buffer_size())

    monkeypatch.setattr(protocol, "GuardedProtocol", Watched)
    app, refusals = EchoApp(), RefusalLog()
    with (
        running(app, LIMITS, refusals) as port,
        connect(port, receive_buffer=4096) as connection,
    ):
        connection.sendall(request("/stream"))
        wait_until(lambda: app.gone)
        assert 0 < max(buffered) <= 256 * 1024
        assert refusals.counts == {"slow_reader": 1}
        body = b""
        while data := connection.recv(65536):
            body = data
        assert not body.endswith(b"0\r\n\r\n")  # it does not look complete


def test_who_reads_a_byte_now_and_then_too(port: int, app: EchoApp) -> None:
    with connect(port, receive_buffer=4096) as connection:
        connection.sendall(request("/stream"))
        started = time.monotonic()
        while not app.gone:
            connection.recv(1)
            time.sleep(0.02)
            assert time.monotonic() - started < 15.0


def test_who_reads_steadily_is_not(port: int, app: EchoApp) -> None:
    with connect(port, receive_buffer=65536) as connection:
        connection.sendall(request("/stream"))
        started = time.monotonic()
        while time.monotonic() - started < 1.0:
            assert connection.recv(65536)
            time.sleep(0.02)
        assert not app.gone


def test_the_end_of_an_answer_must_be_read_too(port: int, refusals: RefusalLog) -> None:
    asked = [request(path, *fields) for path in ("/large", "/break")
             for fields in ((), ("Connection: close",))]  # fmt: skip
    with ExitStack() as stack:
        for data in asked:
            stack.enter_context(connect(port, receive_buffer=4096)).sendall(data)
        wait_until(lambda: refusals.counts["slow_reader"] == len(asked))


# Many


@pytest.mark.parametrize(
    "start",
    [b"", b"GET / HTTP/1.1\r\n", request("/", "Content-Length: 9", method="POST"), request("/")],
)
def test_the_oldest_of_those_we_wait_for_makes_room(start: bytes) -> None:
    limits, refusals = ConnectionLimits(max_connections=20), RefusalLog()
    with ExitStack() as stack, running(EchoApp(), limits, refusals) as port:
        half_open: list[socket.socket] = []
        for _ in range(20):
            half_open.append(stack.enter_context(connect(port)))
            half_open[-1].sendall(start)
            if start == request("/"):  # idle, between two requests
                assert read_answer(half_open[-1]).status == 200
            if len(half_open) == 1:
                time.sleep(0.05)  # clocks may be coarse
        assert say(port, request("/")).status == 200
        assert hung_up(half_open[0])
        half_open[-1].settimeout(0.1)
        assert not hung_up(half_open[-1])
        assert refusals.counts == {"connection_replaced": 1}


def test_who_is_served_is_never_replaced() -> None:
    app, limits = EchoApp(), ConnectionLimits(max_connections=5)
    with ExitStack() as stack, running(app, limits) as port:
        served = [stack.enter_context(connect(port)) for _ in range(5)]
        for connection in served:
            connection.sendall(request("/hold"))
        wait_until(lambda: app.num_holding == 5)
        with connect(port) as connection:
            answer = read_answer(connection)
            assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
            assert answer.headers["retry-after"] == "1"
            assert hung_up(connection)
        served.pop().close()
        wait_until(lambda: app.num_holding == 4)
        assert say(port, request("/")).status == 200
        assert app.num_holding == 4


def test_half_open_connections_slow_nobody_down(port: int, app: EchoApp) -> None:
    """Five hundred of them, as long as they are tolerated."""

    def p95() -> float:
        seconds: list[float] = []
        for _ in range(60):
            started = time.perf_counter()
            assert say(port, request("/")).status == 200
            seconds.append(time.perf_counter() - started)
        return sorted(seconds)[56]

    ratios: list[float] = []
    for _ in range(5):
        alone = p95()
        with ExitStack() as stack:
            for _ in range(500):
                stack.enter_context(connect(port)).sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            ratios.append(p95() / alone)
        if ratios[-1] <= 1.5:
            return
    raise AssertionError(f"good clients waited {ratios} times as long")
