"""The application: its routes, its middleware, how errors are answered."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from jaxllm.frontend.client import EngineClient

from .errors import handle_error
from .middleware.auth import AuthMiddleware
from .middleware.body_limit import BodyLimitMiddleware
from .middleware.request_id import RequestIdMiddleware
from .openai.chat import chat_completions
from .openai.completions import completions
from .openai.models import get_model, list_models
from .ops.health import health
from .serving import Serving
from .settings import ServerSettings

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
            Middleware(AuthMiddleware, api_keys=settings.api_keys),
            Middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes),
        ],
        # Not Exception: Starlette would raise it again after answering, to be logged twice.
        exception_handlers={HTTPException: handle_error, BaseException: handle_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.serving = Serving(client, settings)
    return app
