"""Every route: who answers it, and what its document says of it."""

from starlette.routing import Route

from server.anthropic.answers import AnthropicErrorAnswer, Message, TokenCount
from server.anthropic.messages import count_tokens, messages
from server.anthropic.schemas import CountTokensRequest, MessagesRequest
from server.openai import answers
from server.openai.chat import chat_completions
from server.openai.completions import completions
from server.openai.embeddings import EmbeddingRequest, embeddings
from server.openai.models import get_model, list_models
from server.openai.response_request import ResponsesRequest
from server.openai.responses import responses
from server.openai.schemas import ChatCompletionRequest, CompletionRequest
from server.openai.tokenization import DetokenizeRequest, TokenizeRequest, detokenize, tokenize
from server.openapi import Get, Operation, Post, openapi_route
from server.ops.about import load, version
from server.ops.health import live, ready
from server.ops.metrics import metrics

_READY = "May requests be sent here?"

OPERATIONS: tuple[Operation, ...] = (
    Post(
        "/v1/chat/completions",
        chat_completions,
        "Answer a conversation",
        answers.ChatCompletion,
        ChatCompletionRequest,
        streams=True,
    ),
    Post(
        "/v1/completions",
        completions,
        "Continue prompts",
        answers.Completion,
        CompletionRequest,
        streams=True,
    ),
    Post(
        "/v1/responses",
        responses,
        "Answer a conversation; nothing is stored",
        answers.ResponseObject,
        ResponsesRequest,
        streams=True,
    ),
    Post(
        "/v1/messages",
        messages,
        "Answer a conversation, as Anthropic does",
        Message,
        MessagesRequest,
        streams=True,
        error=AnthropicErrorAnswer,
    ),
    Post(
        "/v1/messages/count_tokens",
        count_tokens,
        "Count a conversation's tokens",
        TokenCount,
        CountTokensRequest,
        error=AnthropicErrorAnswer,
    ),
    Post(
        "/v1/embeddings",
        embeddings,
        "Embed texts; needs --enable-embeddings",
        answers.EmbeddingList,
        EmbeddingRequest,
    ),
    Post("/tokenize", tokenize, "Text to token ids", answers.Tokens, TokenizeRequest),
    Post("/detokenize", detokenize, "Token ids to text", answers.Text, DetokenizeRequest),
    Get("/v1/models", list_models, "List the model's names", answers.ModelList),
    Get("/v1/models/{model:path}", get_model, "Tell of one name", answers.ModelCard),
    Get("/version", version, "The server's version", answers.Version),
    Get("/load", load, "Requests that are being answered", answers.Load),
    Get("/metrics", metrics, "Figures for Prometheus", None),
    Get("/health", ready, _READY, answers.Status),
    Get("/health/ready", ready, _READY, answers.Status),
    Get("/ping", ready, _READY, answers.Status),
    Get("/health/live", live, "Does anybody answer?", answers.Status),
)
ROUTES = (
    *(Route(each.path, each.handler, methods=[each.method]) for each in OPERATIONS),
    openapi_route(OPERATIONS),
)
