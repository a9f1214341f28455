"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.responses import JSONResponse
from server.serving import Serving, serving_of


async def list_models(request: Request) -> Response:
    serving = serving_of(request)
    names = serving.settings.served_model_names
    return JSONResponse({"object": "list", "data": [_card(serving, name) for name in names]})


async def get_model(request: Request) -> Response:
    serving = serving_of(request)
    name = request.path_params["model"]
    serving.check_model(name)
    return JSONResponse(_card(serving, name))


def _card(serving: Serving, name: str) -> dict[str, Any]:
    info = serving.client.info
    return {
        "id": name,
        "object": "model",
        "created": serving.started,
        "owned_by": "jaxllm",
        "root": info.model,
        "parent": None,
        "max_model_len": info.max_model_len,
    }
