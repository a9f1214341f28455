"""The application: its routes, its middleware, how errors are answered."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from jaxllm.errors import JaxLLMError
from jaxllm.frontend.client import EngineClient
from server.errors import handle_error
from server.middleware.auth import AuthMiddleware
from server.middleware.body_limit import BodyLimitMiddleware
from server.middleware.fault import FaultMiddleware
from server.middleware.request_id import RequestIdMiddleware
from server.openai.chat import chat_completions
from server.openai.completions import completions
from server.openai.models import get_model, list_models
from server.ops.health import health
from server.serving import Serving
from server.settings import ServerSettings

ROUTES = (
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model:path}", get_model, methods=["GET"]),
    Route("/health", health, methods=["GET"]),
)


def create_app(
    client: EngineClient,
    settings: ServerSettings,
    *,
    on_shutdown: Callable[[], Awaitable[None]] | None = None,
) -> Starlette:
    """``on_shutdown`` runs when the server has answered its last request: the engine's end."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        yield
        if on_shutdown is not None:
            await on_shutdown()

    app = Starlette(
        routes=list(ROUTES),
        middleware=[
            Middleware(RequestIdMiddleware),
            Middleware(FaultMiddleware),
            Middleware(AuthMiddleware, api_keys=settings.api_keys),
            Middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes),
        ],
        exception_handlers={
            kind: handle_error for kind in (JaxLLMError, HTTPException, ClientDisconnect)
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.serving = Serving(client, settings)
    return app
