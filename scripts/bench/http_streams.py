"""What one streamed chunk costs the HTTP process: the real server over an engine that only counts.

    http_streams.py [--streams 256] [--period-ms 15] [--seconds 10] [--endpoint chat] [--json FILE]

A fake engine process gives every stream one token per period; a client in this process reads all
streams and does nothing else. Reported are chunks per second of the HTTP process's own CPU time
(user and system), which other load on the machine hardly changes, beside what really arrived.
"""

import argparse
import json
import os
import selectors
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tests, wherever this is started from

from tests.conftest import write_tiny_tokenizer  # noqa: E402
from tests.server.command import Command, serve_command  # noqa: E402

TEXT = "Pack my box with five dozen liquor jugs. "


def open_stream(url: str, endpoint: str, max_tokens: int) -> socket.socket:
    body: dict[str, Any] = {"model": "fake", "stream": True, "max_tokens": max_tokens}
    if endpoint == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": TEXT}]
    else:
        path = "/v1/completions"
        body["prompt"] = TEXT
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=10)
    connection.sendall(head.encode() + content)
    connection.setblocking(False)
    return connection


def read_streams(streams: list[socket.socket], seconds: float) -> tuple[int, int, list[float]]:
    """Chunks, reads (one per write that was not merged on its way), and gaps between reads."""
    chunks = reads = 0
    gaps: list[float] = []
    last: dict[int, float] = {}
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        deadline = time.monotonic() + seconds
        while (now := time.monotonic()) < deadline:
            for key, _ in selector.select(0.1):
                data = os.read(key.fd, 65536)
                if not data:
                    sys.exit("a stream ended early")
                reads += 1
                chunks += data.count(b"\n\n")
                if key.fd in last:
                    gaps.append(now - last[key.fd])
                last[key.fd] = now
    return chunks, reads, gaps


def measure(args: argparse.Namespace, command: Command) -> dict[str, Any]:
    url, process = command.url(), psutil.Process(command.process.pid)
    streams = [open_stream(url, args.endpoint, 900_000) for _ in range(args.streams)]
    read_streams(streams, 2.0)  # all have begun
    before, started = process.cpu_times(), time.monotonic()
    chunks, reads, gaps = read_streams(streams, args.seconds)
    after, wall = process.cpu_times(), time.monotonic() - started
    user, system = after.user - before.user, after.system - before.system
    gaps.sort()
    for stream in streams:
        stream.close()
    return {
        "streams": args.streams,
        "endpoint": args.endpoint,
        "asked_per_s": round(args.streams * 1000 / args.period_ms),
        "chunks_per_s": round(chunks / wall),
        "chunks_per_cpu_s": round(chunks / (user + system)),
        "us_per_chunk": round(1e6 * (user + system) / chunks, 1),
        "us_system": round(1e6 * system / chunks, 1),
        "http_cpu": round((user + system) / wall, 2),
        "chunks_per_read": round(chunks / reads, 2),
        "gap_p50_ms": round(1000 * gaps[len(gaps) // 2], 1),
        "gap_p99_ms": round(1000 * gaps[len(gaps) * 99 // 100], 1),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What one streamed chunk costs.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--period-ms", type=float, default=15.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="chat")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer_dir = write_tiny_tokenizer(Path(directory))
        flags = ("--max-model-len", "1000000")
        with serve_command(tokenizer_dir, f"paced:{args.period_ms}", *flags) as command:
            report = measure(args, command)
    print(json.dumps(report, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
