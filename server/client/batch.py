"""``jaxllm run-batch``: the requests of a file, answered by a local model or a server.

Ended at any moment and started again, it goes on where it was.
"""

import asyncio
import json
import random
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxllm.bench.http_client import HTTPError
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError, RequestFailedError
from server.client.batch_file import BadLine, BatchLine, InputFile, OutputFile
from server.client.conversation import reason_of
from server.client.endpoint import Endpoint, connect, local, read_body
from server.client.options import BatchOptions
from server.settings import ServerSettings

BUSY = frozenset({429, 502, 503})  # says nothing about the request: it is sent again
KEYLESS = frozenset({401, 403})  # says the same of every request: no use in going on
MAX_TRIES = 12
WAIT_S = (0.5, 30.0)  # before the second try, and at most


def run_batch(source: Path, target: Path, options: BatchOptions, config: EngineConfig) -> int:
    """Returns 0 if every line of ``target`` is a success then, else 1.

    Raises:
        ConfigError: a file cannot be used, nobody answers at the URL, the engine cannot start.
        RequestFailedError: answers stopped coming; what came is in ``target``.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError("The output must not be the input.")
    requests = InputFile(source)
    with OutputFile(target) as results:
        asyncio.run(_Batch(requests, results, options).run(config))
        failed = results.num_failed
        print(f"{target}: {failed} of {requests.num_lines} lines failed.", file=sys.stderr)
        return 1 if failed else 0


class _Batch:
    def __init__(self, requests: InputFile, results: OutputFile, options: BatchOptions):
        self._requests = requests
        self._results = results
        self._options = options

    async def run(self, config: EngineConfig) -> None:
        """Starts nothing when everything is done already."""
        with tqdm(total=self._requests.num_lines, unit="req", disable=None) as bar:
            todo = self._todo(bar)
            first = next(todo, None)
            if first is None:
                return
            async with AsyncExitStack() as stack:
                endpoint = await self._open(config, stack)
                await self._all(endpoint, first, todo, bar)

    async def _open(self, config: EngineConfig, stack: AsyncExitStack) -> Endpoint:
        if self._options.url is not None:
            return await connect(self._options.url, None)
        settings = ServerSettings(
            access_log="off",
            served_model_names=self._options.served_model_names,
            max_num_queued_reqs=2**31,
            max_num_queued_tokens=2**62,
        )
        return await stack.enter_async_context(local(config, settings))

    def _todo(self, bar: "tqdm[Any]") -> Iterator[BatchLine]:
        """What is left of the input; lines that are no requests are settled on the way."""
        for item in self._requests:
            if isinstance(item, BatchLine):
                if item.custom_id not in self._results.done:
                    yield item
                    continue
            elif not self._is_settled(item):
                self._results.add_bad_line(item)
            bar.update()

    def _is_settled(self, bad: BadLine) -> bool:
        if bad.custom_id is not None:
            return bad.custom_id in self._results.done
        return bad.number in self._results.bad_lines

    async def _all(
        self, endpoint: Endpoint, first: BatchLine, todo: Iterator[BatchLine], bar: "tqdm[Any]"
    ) -> None:
        items = chain((first,), todo)  # of which each worker takes the next

        async def work() -> None:
            for item in items:
                await self._one(endpoint, item)
                bar.update()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._options.max_concurrency, self._requests.num_lines)):
                    group.create_task(work())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _one(self, endpoint: Endpoint, item: BatchLine) -> None:
        """Raises RequestFailedError when it is no use to go on."""
        reason = ""
        for attempt in range(MAX_TRIES):
            pause_s = WAIT_S[0] * 2**attempt
            try:
                async with endpoint.post(item.url, item.body) as answer:
                    content = await read_body(answer)
            except (OSError, HTTPError) as error:
                reason = f"{getattr(error, 'strerror', None) or error}."
            else:
                if answer.status in KEYLESS:
                    raise RequestFailedError(reason_of(content, answer.status))
                if answer.status not in BUSY:
                    request_id = answer.headers.get("x-request-id", "")
                    body = _decoded(content)
                    self._results.add_answer(item.custom_id, answer.status, request_id, body)
                    return
                reason = reason_of(content, answer.status)
                pause_s = max(pause_s, _seconds(answer.headers.get("retry-after", "")))
            if attempt + 1 < MAX_TRIES:
                await asyncio.sleep(min(pause_s, WAIT_S[1]) * random.uniform(0.75, 1.25))
        raise RequestFailedError(
            f"No answer after {MAX_TRIES} tries: {reason} "
            "What was done is kept; the same command goes on from there."
        )


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdecimal() and len(retry_after) < 9 else 0.0


def _decoded(content: bytes) -> Any:
    """JSON, or what else a server may answer with."""
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")
