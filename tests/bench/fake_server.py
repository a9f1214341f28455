"""A server whose answers are bytes made by the test, sent in the pieces the test chose."""

import asyncio
import json
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

Pieces = Sequence[bytes | float]  # a float: so many seconds of silence
Answer = Callable[[str, dict[str, Any]], Pieces]  # path, body -> what is sent


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def head(status: int = 200, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode()


def json_answer(value: Any, status: int = 200) -> list[bytes | float]:
    content = json.dumps(value).encode()
    return [head(status, content_length=str(len(content))), content]


STREAM_HEAD = head(transfer_encoding="chunked", content_type="text/event-stream")
MODELS = {"object": "list", "data": [{"id": "fake"}]}


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def tokens(path: str, body: dict[str, Any], gap: float = 0.0) -> list[bytes | float]:
    """As many tokens as asked for, one per chunk, then the usage."""
    pieces: list[bytes | float] = [STREAM_HEAD]
    chat = "chat" in path
    if chat:
        pieces.append(chunked(event({"choices": [{"delta": {"role": "assistant"}}]})))
    for _ in range(body["max_tokens"]):
        choice = {"delta": {"content": "x"}} if chat else {"text": "x"}
        pieces += [gap, chunked(event({"choices": [choice]}))]
    ending = {"delta": {}} if chat else {"text": ""}
    pieces.append(chunked(event({"choices": [{**ending, "finish_reason": "length"}]})))
    usage = {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}
    pieces.append(chunked(event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"))
    return [*pieces, b"0\r\n\r\n"]


class FakeServer:
    def __init__(self, answer: Answer):
        self.answer = answer
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.url = ""
        self.most_at_once = 0
        self._at_once = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            fields = (line.partition(": ") for line in lines if line)
            headers = {name.lower(): value for name, _, value in fields}
            content = await reader.readexactly(int(headers["content-length"]))
            path, body = first.split()[1], json.loads(content or b"{}")
            self.requests.append((path, headers, body))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            models = path.endswith("/v1/models")
            for piece in json_answer(MODELS) if models else self.answer(path, body):
                if isinstance(piece, bytes):
                    writer.write(piece)
                    await writer.drain()
                else:
                    await asyncio.sleep(piece)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._at_once -= 1
            writer.close()


@contextmanager
def fake_server(answer: Answer = tokens) -> Generator[FakeServer]:
    fake, loop, ready = FakeServer(answer), asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()

    async def main() -> None:
        async with await asyncio.start_server(fake.serve, "127.0.0.1", 0) as server:
            fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ready.set()
            await stop.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    try:
        assert ready.wait(5)
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
