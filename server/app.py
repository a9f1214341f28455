"""The application: its middleware around the routes, and how errors are answered."""

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from jaxllm.errors import JaxLLMError
from jaxllm.frontend.client import EngineClient
from server.access_log import AccessLog
from server.errors import handle_error
from server.middleware.auth import OPEN_PATHS, AuthMiddleware
from server.middleware.cors import EXPOSED, OriginMiddleware
from server.middleware.deadline import DeadlineMiddleware
from server.middleware.drain import DrainMiddleware
from server.middleware.fault import FaultMiddleware
from server.middleware.hosts import HostMiddleware
from server.middleware.record import RecordMiddleware, Watcher
from server.middleware.request_id import RequestIdMiddleware
from server.ops.metrics import ServerMetrics
from server.routes import ROUTES
from server.serving import Serving
from server.settings import ServerSettings
from server.tracing import Tracer
from server.ui.page import page_routes


def create_app(
    client: EngineClient, settings: ServerSettings, tracer: Tracer | None = None
) -> Starlette:
    """The whole application; starting and ending the engine and the tracer is the caller's."""
    serving = Serving(client, settings)
    server_metrics = ServerMetrics(serving)
    watchers: list[Watcher] = [server_metrics]
    if settings.access_log != "off":
        watchers.append(AccessLog(settings.access_log))
    if tracer is not None:
        watchers.append(tracer)
    page = page_routes() if settings.ui else ()
    routes = ROUTES + page
    app = Starlette(
        routes=list(routes),
        middleware=[
            Middleware(RequestIdMiddleware),
            Middleware(RecordMiddleware, routes=routes, watchers=watchers),
            *_cors(settings),  # around all that answers, so that pages can read refusals
            Middleware(FaultMiddleware),
            Middleware(HostMiddleware, allowed=settings.allowed_hosts),
            Middleware(
                AuthMiddleware, api_keys=settings.api_keys, open_paths=_open_paths(settings, page)
            ),
            Middleware(DrainMiddleware, drain=serving.drain),
            Middleware(DeadlineMiddleware, request_timeout_s=settings.request_timeout),
        ],
        exception_handlers={
            kind: handle_error for kind in (JaxLLMError, HTTPException, ClientDisconnect)
        },
    )
    app.router.redirect_slashes = False
    app.state.serving = serving
    app.state.metrics = server_metrics
    return app


def _open_paths(settings: ServerSettings, page: Sequence[Route]) -> frozenset[str]:
    """What is answered without a key."""
    paths = OPEN_PATHS | {route.path for route in page}
    return paths | {"/metrics"} if settings.metrics_no_auth else paths


def _cors(settings: ServerSettings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            OriginMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED,
        )
    ]
