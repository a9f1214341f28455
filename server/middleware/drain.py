"""Refuses requests that would start work once the server is shutting down; counts the others."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.drain import Drain


class DrainMiddleware:
    """All work comes by POST; what is only looked at is answered to the end."""

    def __init__(self, app: ASGIApp, drain: Drain):
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._drain.check()
        with self._drain.request():
            await self._app(scope, receive, send)
