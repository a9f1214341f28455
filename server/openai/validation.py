"""From a body's bytes to a checked request; what is wrong is said in OpenAI's words.

Everything a client can get wrong about a request's form is found here, before any work.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from jaxllm.errors import InvalidRequestError
from server.errors import UnsupportedMediaTypeError
from server.openai.fields import TAG, RequestBody
from server.openai.json_text import parse_json
from server.openai.schemas import GenerationRequest
from server.record import record_of
from server.serving import serving_of

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "a smaller integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "a string",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_BOUNDS = {  # pydantic's error type -> (key of the bound, sign, OpenAI's word)
    "greater_than_equal": ("ge", ">=", "below_min"),
    "greater_than": ("gt", ">", "below_min"),
    "less_than_equal": ("le", "<=", "above_max"),
    "less_than": ("lt", "<", "above_max"),
}


async def read_request[T: RequestBody](request: Request, schema: type[T]) -> T:
    """The request's body as a ``schema``, for a model that is served.

    Raises:
        UnsupportedMediaTypeError, BodyTooLargeError: the body is not read (to its end).
        InvalidRequestError: it is not JSON, or a field is wrong; ``param`` says which.
        ModelNotFoundError: no such model.
    """
    serving = serving_of(request)
    tenant = record_of(request).tenant
    serving.gate.check(tenant=tenant)  # a request that would be refused is not worth reading
    body = parse_json(await _read_body(request))
    if isinstance(body, Mapping):
        _check_refused(body, schema.REFUSED)
    try:
        parsed = schema.model_validate(body)
    except ValidationError as error:
        raise to_invalid_request(error) from None
    model: str | None = getattr(parsed, "model", None)
    if model is not None:
        record_of(request).model = model
        serving.check_model(model)
    if isinstance(parsed, GenerationRequest):
        _check_choices(parsed, serving.settings.max_n)
    unknown = parsed.model_extra or {}
    unknown = [name for name in unknown if name not in schema.REFUSED]
    if unknown and serving.settings.strict_params:
        raise InvalidRequestError(
            f"Unknown parameter: '{unknown[0][:64]}'.",
            param=unknown[0][:64],
            code="unknown_parameter",
        )
    serving.note_ignored(unknown)
    return parsed


def _check_choices(body: GenerationRequest, most: int) -> None:
    asked = body.num_sequences
    if asked > most:
        name = "n" if body.best_of is None else "best_of"
        raise InvalidRequestError(
            f"Invalid '{name}': integer above maximum value. Expected a value <= {most}, but got "
            f"{asked} instead. This server's operator can allow more with --max-n.",
            param=name,
            code="integer_above_max_value",
        )


async def _read_body(request: Request) -> bytes:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaTypeError(
            "Unsupported Content-Type: send the header 'Content-Type: application/json'."
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMediaTypeError("Send the body without a Content-Encoding.")
    return await request.body()


def to_invalid_request(error: ValidationError) -> InvalidRequestError:
    """The first of its errors, as OpenAI would say it."""
    details = error.errors(include_url=False)[0]
    kind, context = details["type"], details.get("ctx", {})
    param = _path(details["loc"])
    if kind in ("missing", "missing_field"):
        param = f"{param}.{context['name']}" if kind == "missing_field" else param
        return _error(
            f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
        )
    if kind == "conflict":
        param = str(context["param"])
        return _error(f"Invalid '{param}': {details['msg']}.", param, "invalid_value")
    if kind in _BOUNDS:
        return _out_of_bounds(details, param)
    if kind == "string_too_short":
        return _error(f"Invalid '{param}': it must not be empty.", param, "empty_string")
    if kind in ("too_long", "too_short", "string_too_long"):
        return _wrong_length(details, param)
    if kind == "literal_error":
        message = f"Invalid value: {_quoted(details['input'])}. Supported values are: "
        return _error(f"{message}{context['expected']}.", param, "invalid_value")
    if kind in _EXPECTED or kind == "invalid_type":
        expected = _EXPECTED.get(kind) or details["msg"]
        what = f"'{param}'" if param else "the request body"
        got = _type_name(details["input"])
        message = f"Invalid type for {what}: expected {expected}, but got {got} instead."
        return _error(message, param, "invalid_type")
    code = kind if kind.startswith("unsupported") else "invalid_value"
    return _error(f"Invalid '{param}': {details['msg']}.", param, code)


def _check_refused(body: Mapping[Any, Any], refused: Mapping[str, str]) -> None:
    for name, instead in refused.items():
        if body.get(name) not in (None, False, "", [], {}):
            message = f"The parameter '{name}' is not supported: {instead}."
            raise InvalidRequestError(message, param=name, code="unsupported_parameter")


def _error(message: str, param: str, code: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param or None, code=code)


def _path(loc: tuple[int | str, ...]) -> str:
    """``messages[0].content``."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(TAG):
            path += f".{part[:64]}" if path else part[:64]
    return path


def _out_of_bounds(details: ErrorDetails, param: str) -> InvalidRequestError:
    key, sign, word = _BOUNDS[details["type"]]
    bound = details.get("ctx", {})[key]
    number, shown = ("decimal", f"{bound:g}") if isinstance(bound, float) else ("integer", bound)
    words = "above maximum" if word == "above_max" else "below minimum"
    return _error(
        f"Invalid '{param}': {number} {words} value. Expected a value {sign} {shown}, "
        f"but got {_quoted(details['input'])} instead.",
        param,
        f"{number}_{word}_value",
    )


def _wrong_length(details: ErrorDetails, param: str) -> InvalidRequestError:
    context = details.get("ctx", {})
    if details["type"] == "too_short":
        message = f"Invalid '{param}': it must hold at least {context['min_length']} item."
        return _error(message, param, "empty_array")
    of_text = details["type"] == "string_too_long"
    message = f"Invalid '{param}': it may hold at most {context['max_length']} "
    message += "characters." if of_text else "items."
    return _error(message, param, f"{'string' if of_text else 'array'}_above_max_length")


def _quoted(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float) else _type_name(value)
    return text if len(text) <= 64 else f"{text[:61]}..."


def _type_name(value: Any) -> str:
    if value is None:
        return "null"
    names: tuple[tuple[type, str], ...] = (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a decimal number"),
        (str, "a string"),
        (list, "an array"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "an object")
