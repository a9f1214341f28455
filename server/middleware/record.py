"""Keeps a record of every request, and shows it to whoever wants to know once it has ended."""

from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ClientGoneError
from server.record import RequestRecord

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})
OTHER = "other"  # methods and routes that do not exist, so that nobody can invent labels

Watcher = Callable[[RequestRecord], None]


class RecordMiddleware:
    """``scope["state"]["record"]``; its end is the answer's last byte, or the client's going."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], watchers: Sequence[Watcher]):
        self._app = app
        self._routes = [route for route in routes if isinstance(route, Route)]
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        record = RequestRecord(
            request_id=scope["state"]["request_id"],
            method=scope["method"] if scope["method"] in METHODS else OTHER,
            route=self._route(scope),
            traceparent=headers.get("traceparent", ""),
            tracestate=headers.get("tracestate", ""),
        )
        scope["state"]["record"] = record

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        finally:
            record.status = record.status or ClientGoneError.status
            record.tenant = scope["state"].get("tenant", "")
            record.finish()
            for watch in self._watchers:
                watch(record)

    def _route(self, scope: Scope) -> str:
        """The template of the route, whatever becomes of the request on its way there."""
        for route in self._routes:
            if route.matches(scope)[0] is not Match.NONE:
                return route.path
        return OTHER
