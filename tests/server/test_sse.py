"""How a stream is framed, and that the reader of all tests accepts nothing else."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from jaxllm.errors import EngineDeadError
from server.sse import EventStream
from tests.server.sse import Recorder, read_stream


def chunk(index: int = 0, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": index, "finish_reason": reason}]}


async def sent(events: AsyncGenerator[list[Any]]) -> list[tuple[bytes, bool]]:
    """Body and more_body of each message after the start."""
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {"state": {"request_id": "r"}}
    await EventStream(events, ping_interval_s=15)(scope, receive, send)
    assert messages[0]["type"] == "http.response.start"
    return [(message["body"], message["more_body"]) for message in messages[1:]]


def test_what_is_there_together_is_one_write() -> None:
    async def events() -> AsyncGenerator[list[Any]]:
        yield [chunk(0), chunk(1)]
        yield [chunk(0, "stop"), chunk(1, "length")]

    first, second, end = asyncio.run(sent(events()))
    assert first[0].count(b"data: ") == 2 and second[0].count(b"data: ") == 2
    assert end == (b"data: [DONE]\n\n", False)  # the end of the stream is in the same write


def test_a_failure_is_the_last_write() -> None:
    async def events() -> AsyncGenerator[list[Any]]:
        yield [chunk()]
        raise EngineDeadError("It died.")

    _, (end, more) = asyncio.run(sent(events()))
    assert json.loads(end.removeprefix(b"data: "))["error"]["message"] == "It died." and not more


CHUNK = "data: " + json.dumps(chunk()) + "\n\n"
END = "data: " + json.dumps(chunk(reason="stop")) + "\n\n"
DONE = "data: [DONE]\n\n"
ERROR = 'data: {"error":{"message":"m","type":"t","param":null,"code":null}}\n\n'
USAGE = 'data: {"choices":[],"usage":{"total_tokens":1}}\n\n'


@pytest.mark.parametrize(
    "text", [CHUNK + END + DONE, ERROR, CHUNK + ERROR, ": ping\n\n" + CHUNK + END + USAGE + DONE]
)
def test_the_reader_accepts_the_right_forms(text: str) -> None:
    stream = read_stream(text)
    assert stream.done != (stream.error is not None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        CHUNK,
        CHUNK + END,
        CHUNK + DONE,
        DONE,
        END + DONE + DONE,
        END + ERROR + DONE,
        END + DONE + ERROR,
        ERROR + ERROR,
        END + DONE + CHUNK,
        END + CHUNK + DONE,
        END + END + DONE,
        USAGE + END + DONE,
        (END + DONE)[:-1],
        'data: {"error":{"message":"m"}}\n\n',
        "data: " + json.dumps(chunk(reason="abort")) + "\n\n" + DONE,
    ],
)
def test_the_reader_refuses_the_wrong_ones(text: str) -> None:
    with pytest.raises(AssertionError):
        read_stream(text)


def test_a_stream_that_just_stops_is_noticed() -> None:
    recorder = Recorder(started=True)
    with pytest.raises(AssertionError):
        recorder.check()
    Recorder(started=True, left=True).check()
    with pytest.raises(AssertionError):
        Recorder(started=True, left=True, body=bytearray(DONE.encode())).check()
