"""GET /openapi.json: the document of all routes, made from the schemas that check requests.

What a schema cannot say (fields that exclude each other, the model's own limits) is left to the
errors, whose one form stands for every status but 200.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

import jaxllm
from server.anthropic import answers as anthropic
from server.anthropic.schemas import CountTokensRequest, MessagesRequest
from server.middleware.auth import OPEN_PATHS
from server.openai import answers
from server.openai.embeddings import EmbeddingRequest
from server.openai.fields import RequestBody
from server.openai.response_request import ResponsesRequest
from server.openai.schemas import ChatCompletionRequest, CompletionRequest
from server.openai.tokenization import DetokenizeRequest, TokenizeRequest
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


@dataclass(frozen=True, slots=True)
class Operation:
    summary: str
    answer: type[BaseModel] | None  # None: plain text
    body: type[RequestBody] | None = None
    streams: bool = False
    error: type[BaseModel] = answers.ErrorAnswer


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "Answer a conversation", answers.ChatCompletion, ChatCompletionRequest, streams=True
    ),
    ("POST", "/v1/completions"): Operation(
        "Continue prompts", answers.Completion, CompletionRequest, streams=True
    ),
    ("POST", "/v1/responses"): Operation(
        "Answer a conversation; nothing is stored",
        answers.ResponseObject,
        ResponsesRequest,
        streams=True,
    ),
    ("POST", "/v1/messages"): Operation(
        "Answer a conversation, as Anthropic does",
        anthropic.Message,
        MessagesRequest,
        streams=True,
        error=anthropic.AnthropicErrorAnswer,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "Count a conversation's tokens",
        anthropic.TokenCount,
        CountTokensRequest,
        error=anthropic.AnthropicErrorAnswer,
    ),
    ("POST", "/v1/embeddings"): Operation(
        "Embed texts; needs --enable-embeddings", answers.EmbeddingList, EmbeddingRequest
    ),
    ("GET", "/v1/models"): Operation("List the model's names", answers.ModelList),
    ("GET", "/v1/models/{model}"): Operation("Tell of one name", answers.ModelCard),
    ("POST", "/tokenize"): Operation("Text to token ids", answers.Tokens, TokenizeRequest),
    ("POST", "/detokenize"): Operation("Token ids to text", answers.Text, DetokenizeRequest),
    ("GET", "/version"): Operation("The server's version", answers.Version),
    ("GET", "/load"): Operation("Requests that are being answered", answers.Load),
    ("GET", "/metrics"): Operation("Figures for Prometheus", None),
    ("GET", "/health"): Operation("May requests be sent here?", answers.Status),
    ("GET", "/health/ready"): Operation("May requests be sent here?", answers.Status),
    ("GET", "/health/live"): Operation("Does anybody answer?", answers.Status),
    ("GET", "/ping"): Operation("May requests be sent here?", answers.Status),
}


async def openapi(request: Request) -> Response:
    settings = serving_of(request).settings
    return JSONResponse(document(settings.served_model_names, bool(settings.api_keys)))


@cache
def document(model_names: Sequence[str], wants_key: bool) -> dict[str, Any]:
    """OpenAPI 3.1, for a server that has models of these names."""
    schemas = _schemas(list(model_names))
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(operation, path, model_names)
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


def _schemas(model_names: list[str]) -> dict[str, Any]:
    bodies = [item.body for item in OPERATIONS.values() if item.body is not None]
    found = [item.answer for item in OPERATIONS.values() if item.answer is not None]
    errors = [item.error for item in OPERATIONS.values()]
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
