"""Answers what other middleware refuses. The last net, too: an error that nobody foresaw is logged
once and answered with a plain 500; Starlette's own net would raise it again, to be logged twice.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_response, log_unexpected


class FaultMiddleware:
    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception as error:
            if started:
                raise  # the server closes the connection: a whole answer is not possible any more
            request_id: str = scope["state"]["request_id"]
            log_unexpected(error, request_id)
            await error_response(error, request_id)(scope, receive, send)
