"""GET /openapi.json: the document of all routes, made from the schemas that check requests.

What a schema cannot say (fields that exclude each other, the model's own limits) is left to the
errors, whose one form stands for every status but 200.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import jaxllm
from server.middleware.auth import OPEN_PATHS
from server.openai import answers
from server.openai.fields import RequestBody
from server.responses import JSONResponse
from server.serving import serving_of

# What a field that is not supported may hold: it says nothing.
_NOTHING: list[Any] = [None, False, 0, "", [], {}]
_TEXT = {"type": "string"}
_EVENT = {
    "type": "object",
    "properties": {"data": _TEXT, "event": _TEXT},
    "required": ["data"],
}
_REF = "#/components/schemas/{model}"


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """``path`` as Starlette writes it; ``answer`` None: plain text."""

    path: str
    handler: Handler
    summary: str
    answer: type[BaseModel] | None
    body: type[RequestBody] | None = None
    streams: bool = field(default=False, kw_only=True)
    error: type[BaseModel] = field(default=answers.ErrorAnswer, kw_only=True)
    method: ClassVar[str]


class Get(Operation):
    method = "GET"


class Post(Operation):
    method = "POST"


def openapi_route(operations: tuple[Operation, ...]) -> Route:
    async def openapi(request: Request) -> Response:
        settings = serving_of(request).settings
        names, wants_key = settings.served_model_names, bool(settings.api_keys)
        return JSONResponse(document(operations, names, wants_key))

    return Route("/openapi.json", openapi, methods=["GET"])


@cache
def document(
    operations: tuple[Operation, ...], model_names: tuple[str, ...], wants_key: bool
) -> dict[str, Any]:
    """OpenAPI 3.1, for a server that has models of these names."""
    schemas = _schemas(operations, list(model_names))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = operation.path.replace(":path", "")
        described = _operation(operation, path, model_names)
        paths.setdefault(path, {})[operation.method.lower()] = described
    key = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxllm", "version": jaxllm.__version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": key}},
        "security": [{"key": []}] if wants_key else [],
    }


def _operation(operation: Operation, path: str, model_names: Sequence[str]) -> dict[str, Any]:
    text = {"text/plain": {"schema": _TEXT}}
    content = text if operation.answer is None else _json(operation.answer)
    if operation.streams:
        content = content | {"text/event-stream": {"schema": _EVENT}}
    # What is refused below the application is in OpenAI's form on every path.
    errors = dict.fromkeys((operation.error, answers.ErrorAnswer))
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "the answer", "content": content},
            "default": {"description": "an error", "content": _json(*errors)},
        },
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _json(operation.body)}
    if "{model}" in path:
        name = {"type": "string", "enum": list(model_names)}
        parameter = {"name": "model", "in": "path", "required": True, "schema": name}
        described["parameters"] = [parameter]
    if path in OPEN_PATHS:
        described["security"] = []
    return described


def _json(*models: type[BaseModel]) -> dict[str, Any]:
    """JSON of one of ``models``."""
    references: list[dict[str, Any]] = [{"$ref": _REF.format(model=m.__name__)} for m in models]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"application/json": {"schema": schema}}


def _schemas(operations: tuple[Operation, ...], model_names: list[str]) -> dict[str, Any]:
    bodies = [item.body for item in operations if item.body is not None]
    found = [item.answer for item in operations if item.answer is not None]
    errors = [item.error for item in operations]
    models: list[type[BaseModel]] = [*bodies, *dict.fromkeys(found), *dict.fromkeys(errors)]
    _, combined = models_json_schema([(m, "validation") for m in models], ref_template=_REF)
    schemas: dict[str, Any] = combined["$defs"]
    for body in bodies:
        properties = schemas[body.__name__]["properties"]
        _limit_to(model_names, properties["model"])
        for name, instead in body.REFUSED.items():
            properties[name] = {"enum": _NOTHING, "description": f"Not supported: {instead}."}
    return schemas


def _limit_to(model_names: list[str], field: dict[str, Any]) -> None:
    texts = [form for form in field.get("anyOf", [field]) if form.get("type") == "string"]
    for text in texts:
        text["enum"] = model_names
