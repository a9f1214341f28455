"""What became of one streamed request: when its chunks came, how many tokens, or how it failed."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from jaxllm.bench.event_stream import EventStreamParser
from jaxllm.bench.http_client import BaseURL, HTTPError, Response, request

_KIND_CHARS = 80


@dataclass(slots=True)
class RequestRecord:
    """Times are of ``time.perf_counter``, in seconds."""

    started: float = 0.0  # before the connection was made
    chunk_times: list[float] = field(default_factory=list)  # of chunks with text (see record())
    ended: float = 0.0  # the last chunk that belongs to a choice
    prompt_tokens: int | None = None  # None: the server sent no usage
    output_tokens: int | None = None
    failure: str | None = None  # the kind; None: it went well

    @property
    def ttft(self) -> float:
        return self.chunk_times[0] - self.started

    @property
    def e2e(self) -> float:
        return self.ended - self.started

    @property
    def itl(self) -> list[float]:
        """Gaps between chunks; one may bring several tokens."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times)]

    @property
    def num_output_tokens(self) -> int:
        return len(self.chunk_times) if self.output_tokens is None else self.output_tokens

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None if there was no other."""
        tokens = self.num_output_tokens
        return (self.e2e - self.ttft) / (tokens - 1) if tokens > 1 else None


async def record_request(
    base: BaseURL,
    route: str,
    body: Mapping[str, Any],
    headers: dict[str, str],
    *,
    expected_tokens: int | None = None,
    timeout_s: float | None = None,
) -> RequestRecord:
    """Send ``body``, read the stream to its end. Whatever goes wrong is in ``failure``.

    A stream without ``[DONE]`` failed, and so did one whose usage tells another number than
    ``expected_tokens``: figures of such a request would mean nothing.
    """
    record = RequestRecord()
    content = json.dumps(body).encode()
    record.started = time.perf_counter()
    try:
        async with (
            asyncio.timeout(timeout_s),
            request(base, "POST", route, headers=headers, body=content) as response,
        ):
            record.failure = await _read(record, response)
    except TimeoutError:
        record.failure = "timeout"
    except HTTPError as error:
        record.failure = str(error)
    except OSError as error:
        record.failure = f"connection: {error.strerror or error}"[:_KIND_CHARS]
    except ValueError as error:  # neither UTF-8 nor JSON
        record.failure = f"not JSON: {error}"[:_KIND_CHARS]
    told = record.output_tokens
    if record.failure is None and None not in (expected_tokens, told) and told != expected_tokens:
        record.failure = "wrong number of tokens"
    return record


async def _read(record: RequestRecord, response: Response) -> str | None:
    """Fill the record. Returns the kind of failure."""
    if response.status != 200:
        return f"HTTP {response.status}{_code(await response.read())}"
    async with aclosing(_events(response)) as events:
        async for data in events:
            now = time.perf_counter()
            if data == "[DONE]":
                if record.ended and not record.chunk_times:
                    record.chunk_times.append(record.ended)  # tokens without text, or none at all
                return None if record.ended else "no choices"
            chunk = json.loads(data)
            if not isinstance(chunk, dict):
                return "not a chunk"
            if "error" in chunk:
                return f"error event{_code(data)}"
            _take(record, chunk, now)
    return "stream ended without [DONE]"


async def _events(response: Response) -> AsyncGenerator[str]:
    parser = EventStreamParser()
    async with aclosing(response.parts()) as parts:
        async for part in parts:
            for data in parser.feed(part):
                yield data


def _take(record: RequestRecord, chunk: dict[str, Any], now: float) -> None:
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        record.prompt_tokens = usage.get("prompt_tokens")
        record.output_tokens = usage.get("completion_tokens")
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        # The first chunk of a chat names the role only; thoughts are tokens like others.
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            record.chunk_times.append(now)
        if choice.get("finish_reason") is not None or record.chunk_times:
            record.ended = now


def _code(body: bytes | str) -> str:
    """``: code`` of OpenAI's error object, else nothing."""
    try:
        error = json.loads(body)["error"]
        code = error.get("code") or error.get("type")
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f": {code}"[:_KIND_CHARS] if code else ""
