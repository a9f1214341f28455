"""POST /tokenize and /detokenize, in vLLM's shapes."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from jaxllm.errors import InvalidRequestError
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.limits import num_prompt_tokens
from server.openai import refused
from server.openai.conversation import LONG_CHARS, ONE_END, Messages, TemplateOptions, render
from server.openai.fields import RequestBody, TokenIds, absent, both, conflict, either, given
from server.openai.validation import read_request
from server.record import record_of
from server.responses import JSONResponse
from server.serving import aside, serving_of

_LONG_IDS = 5_000  # beyond it, decoding would hold up the event loop


class TokenizeRequest(RequestBody, TemplateOptions):
    """A text, or a conversation as the model's template writes it."""

    REFUSED: ClassVar[dict[str, str]] = refused.TOKENIZATION
    model_config = ConfigDict(
        json_schema_extra=both(
            either(
                both(given("prompt"), absent("messages")), both(given("messages"), absent("prompt"))
            ),
            ONE_END,
        )
    )

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # default: for a text only
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: Annotated[TokenIds, Field(description="token ids")]


async def tokenize(request: Request) -> Response:
    body = await read_request(request, TokenizeRequest)
    serving = serving_of(request)
    text, adds = body.prompt, body.add_special_tokens is not False
    if body.messages is not None:
        messages = [message.as_template_message() for message in body.messages]
        text, adds = await render(messages, body, serving), body.add_special_tokens is True
    if text is None:
        raise AssertionError("The schema lets through one of the two.")
    tokenizer = serving.client.tokenizer
    tenant = record_of(request).tenant
    # It takes no place, but it takes time.
    with serving.gate.admit(1, num_prompt_tokens([text]), tenant):
        arguments = (tokenizer, text, adds, bool(body.return_token_strs))
        tokens, strings = await aside(len(text) > LONG_CHARS, _encode, *arguments)
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": serving.client.info.max_model_len,
            "tokens": tokens,
            "token_strs": strings,
        }
    )


async def detokenize(request: Request) -> Response:
    body = await read_request(request, DetokenizeRequest)
    serving = serving_of(request)
    _check_ids(body.tokens, serving.client.info.vocab_size)
    with serving.gate.admit(1, len(body.tokens), record_of(request).tenant):
        long = len(body.tokens) > _LONG_IDS
        text = await aside(long, _decode, serving.client.tokenizer, body.tokens)
    return JSONResponse({"prompt": text})


def _encode(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, with_strings: bool
) -> tuple[list[int], list[str] | None]:
    tokens = tokenizer.encode(text, add_special_tokens)
    return tokens, [tokenizer.token_string(t) for t in tokens] if with_strings else None


def _decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False)


def _check_ids(token_ids: list[int], vocab_size: int) -> None:
    wrong: Any = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise InvalidRequestError(
            f"tokens holds token id {wrong}; this model has ids 0 to {vocab_size - 1}.",
            param="tokens",
            code="invalid_value",
        )
