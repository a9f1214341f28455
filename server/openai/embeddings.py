"""POST /v1/embeddings: the final hidden state of each input's last token, of length 1."""

import base64
import sys
from array import array
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jaxllm.errors import InvalidRequestError, JaxLLMError
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from server.disconnect import unless_disconnected
from server.openai import refused
from server.openai.fields import INT32, InputField, ModelRequest, Salt, prompts_of
from server.openai.reply import Usage
from server.openai.stream import Outputs, about
from server.openai.validation import read_request
from server.record import record_of
from server.responses import JSONResponse
from server.serving import aside, serving_of

MAX_NUMBERS = 2**22  # in one answer: about eighty megabytes of JSON
_LONG_NUMBERS = 100_000  # beyond it, writing them would hold up the event loop

_EMBED = SamplingParams(
    max_tokens=0, embed=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
)


class EmbeddingRequest(ModelRequest):
    REFUSED: ClassVar[dict[str, str]] = refused.EMBEDDING

    input: InputField
    encoding_format: Literal["float", "base64"] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = None
    cache_salt: Salt | None = None
    user: str | None = None  # without effect, as the next two
    safety_identifier: str | None = None
    input_type: str | None = None


async def embeddings(request: Request) -> Response:
    body = await read_request(request, EmbeddingRequest)
    serving = serving_of(request)
    inputs, size = prompts_of(body.input), serving.client.info.embedding_size
    if len(inputs) * size > MAX_NUMBERS:
        raise InvalidRequestError(
            f"{len(inputs)} inputs are too many for one request: an embedding has {size} numbers, "
            f"and at most {MAX_NUMBERS} are sent at once.",
            param="input",
            code="array_above_max_length",
        )
    outputs = about(
        serving.generate(
            inputs,
            _EMBED,
            request_id=f"embd-{uuid4().hex}",
            record=record_of(request),
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            add_special_tokens=body.add_special_tokens is not False,
        ),
        prompt="input",
    )
    answer = _answer(outputs, body, len(inputs))
    whole = await unless_disconnected(request.receive, answer)
    return await aside(len(inputs) * size > _LONG_NUMBERS, JSONResponse, whole)


async def _answer(outputs: Outputs, body: EmbeddingRequest, count: int) -> dict[str, Any]:
    usage = Usage()
    data: dict[int, dict[str, Any]] = {}
    async with aclosing(outputs):
        async for index, output in outputs:
            usage.add(index, output)
            if output.embedding is not None:
                vector = _encoded(output.embedding, body.encoding_format)
                data[index] = {"object": "embedding", "index": index, "embedding": vector}
    if len(data) != count:
        raise JaxLLMError("The engine's output ended before the request did.")
    tokens = sum(usage.prompt_tokens.values())
    return {
        "object": "list",
        "data": [data[index] for index in range(count)],
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(embedding: bytes, encoding_format: str | None) -> str | list[float]:
    """Little-endian float32 in base64, which is what the engine sends, or numbers."""
    if encoding_format == "base64":
        return base64.b64encode(embedding).decode()
    numbers = array("f", embedding)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
