"""Many streams at once from a paced engine: each whole, and how evenly its tokens came."""

import http.client
import io
import json
import os
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.server.command import Command, completion
from tests.server.sse import read_stream
from tests.server.wire import request

BASELINE_STREAMS = 8
BASELINE_S = 3.0
PATIENCE_S = 60.0


@dataclass
class Reading:
    connection: socket.socket
    data: bytearray = field(default_factory=bytearray)
    last: float = 0.0

    def makefile(self, mode: str) -> io.BytesIO:
        """As http.client asks a socket."""
        return io.BytesIO(self.data)

    def check(self, num_tokens: int) -> None:
        response = http.client.HTTPResponse(self)  # type: ignore[arg-type]
        response.begin()
        assert response.status == 200, bytes(self.data[:500])
        stream = read_stream(response.read())
        assert stream.done
        text = "".join(chunk["choices"][0]["text"] for chunk in stream.objects)
        assert text == ("abc" * num_tokens)[:num_tokens]
        assert stream.objects[-1]["choices"][0]["finish_reason"] == "length"


@dataclass(frozen=True, slots=True)
class Evenness:
    """Seconds between what a stream got and what it got next."""

    streams: int
    period: float
    baseline_p99: float  # with few streams
    p50: float
    p99: float

    def check(self) -> None:
        limit = 2 * max(self.period, self.baseline_p99)
        assert self.p99 <= limit, f"{self}, allowed {limit}"


def measure(command: Command, streams: int, seconds: float, period: float) -> Evenness:
    """Raises AssertionError for a stream that is not whole and right."""
    url = command.url()
    baseline = stream_all(url, BASELINE_STREAMS, round(BASELINE_S / period))
    gaps = stream_all(url, streams, round(seconds / period))
    return Evenness(
        streams, period, percentile(baseline, 0.99), percentile(gaps, 0.5), percentile(gaps, 0.99)
    )


def stream_all(url: str, count: int, num_tokens: int) -> list[float]:
    body = json.loads(completion(num_tokens)["content"])
    data = request(
        "/v1/completions",
        "Content-Type: application/json",
        "Connection: close",
        method="POST",
        body=json.dumps(body).encode(),
        host="localhost",
    )
    port = urlsplit(url).port
    readings = [Reading(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(count)]
    for reading in readings:
        reading.connection.sendall(data)
        reading.connection.setblocking(False)
    gaps = read_all(readings)
    for reading in readings:
        reading.check(num_tokens)
    return gaps


def read_all(readings: Sequence[Reading]) -> list[float]:
    gaps: list[float] = []
    with selectors.DefaultSelector() as selector:
        for reading in readings:
            selector.register(reading.connection, selectors.EVENT_READ, reading)
        heard = time.monotonic()
        while selector.get_map():
            ready = selector.select(1.0)
            now = time.monotonic()
            assert ready or now - heard < PATIENCE_S, "nobody gets anything any more"
            heard = now if ready else heard
            for key, _ in ready:
                reading: Reading = key.data
                piece = os.read(key.fd, 65536)
                if not piece:
                    selector.unregister(reading.connection)
                    reading.connection.close()
                    continue
                reading.data += piece
                if reading.last:
                    gaps.append(now - reading.last)
                reading.last = now
    return gaps


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]
