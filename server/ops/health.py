"""GET /health, /health/ready and /health/live: may requests be sent here, does anybody answer?

Health is progress: an engine whose process exists but which finishes no step is not ready. Needs
no key.
"""

from starlette.requests import Request
from starlette.responses import Response

from jaxllm.errors import EngineDeadError
from server.responses import JSONResponse
from server.serving import serving_of


async def ready(request: Request) -> Response:
    """200 while the engine is up, has something to show for it, and the server stays; else 503
    ``engine_unavailable`` with the reason.
    """
    serving = serving_of(request)
    serving.drain.check()
    reason = serving.client.unready_because
    if reason is not None:
        raise EngineDeadError(reason)
    return JSONResponse({"status": "ready"})


async def live(request: Request) -> Response:
    """200 as long as this process turns; whoever gets no answer should restart it."""
    return JSONResponse({"status": "live"})
