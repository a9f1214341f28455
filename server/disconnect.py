"""Notices that the client has gone, so that work nobody waits for ends."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive

from server.errors import ClientGoneError


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has gone. The request's body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes.

    Raises:
        ClientGoneError: the client went first.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGoneError
    finally:
        await cancel(worker, watcher)


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel, and wait until each has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
