"""GET /version and /load, in vLLM's shapes."""

from starlette.requests import Request
from starlette.responses import Response

import jaxllm
from server.responses import JSONResponse
from server.serving import serving_of


async def version(request: Request) -> Response:
    return JSONResponse({"version": jaxllm.__version__})


async def load(request: Request) -> Response:
    """How many requests for work are being answered at this moment."""
    return JSONResponse({"server_load": serving_of(request).drain.num_requests})
