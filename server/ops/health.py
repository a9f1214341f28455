"""GET /health: may requests be sent here? Needs no key."""

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.errors import EngineDeadError
from server.responses import JSONResponse
from server.serving import serving_of


async def health(request: Request) -> Response:
    """200 while the engine takes requests, else 503 ``engine_unavailable``."""
    if not serving_of(request).client.ready:
        raise EngineDeadError("The engine is not ready; it is starting or being restarted.")
    return JSONResponse({"status": "ok"})
