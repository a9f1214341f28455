"""Types of request fields: bounds, lengths, and unions told apart by what a value looks like.

Lists stop at the first wrong element, so that a body full of nonsense is cheap to refuse.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from jaxllm.sampling_params import MAX_LENGTH_PENALTY, MAX_LOGIT_BIAS, MAX_LOGPROBS

MAX_PROMPTS = 64
MAX_INPUTS = 2048  # of an embedding request
MAX_SEQUENCES = 1024  # prompts times n
MAX_MESSAGES = 2048  # and parts of a message's content
MAX_TOOLS = 128
MAX_STOPS = 16  # OpenAI takes 4, but evaluation harnesses send up to a dozen
MAX_BAD_WORDS = 256
MAX_STRING_CHARS = 256  # of a stop string or a bad word
TAG = "~"  # first character of the union tags below; validation.py leaves them out of paths
ONE, MANY, IDS, LISTS = (Tag(f"{TAG}{name}") for name in ("one", "many", "ids", "lists"))

INT32 = 2**31 - 1
INT64 = 2**63 - 1

ShortString = Annotated[str, Field(min_length=1, max_length=MAX_STRING_CHARS)]
Salt = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Stops = Annotated[list[ShortString], Field(fail_fast=True, max_length=MAX_STOPS)]
BadWords = Annotated[list[ShortString], Field(fail_fast=True, max_length=MAX_BAD_WORDS)]
Tools = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_TOOLS)]
# Said in the schema, checked where it is understood:
TokenId = Annotated[int, Field(json_schema_extra={"minimum": 0, "maximum": INT32})]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
_Bias = Annotated[float, Field(json_schema_extra={"minimum": -100, "maximum": 100})]
_IDS_AS_NAMES: dict[str, Any] = {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}
LogitBias = Annotated[
    dict[str, _Bias], Field(max_length=MAX_LOGIT_BIAS, json_schema_extra=_IDS_AS_NAMES)
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LengthPenalty = Annotated[float, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)]
Count = Annotated[int, Field(ge=0, le=INT32)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


def _one_or_many(value: Any) -> str | None:
    if isinstance(value, str):
        return f"{TAG}one"
    return f"{TAG}many" if isinstance(value, list) else None


def _prompt_form(value: Any) -> str | None:
    """By the first element: all others must be like it."""
    if not isinstance(value, list) or not value:
        return _one_or_many(value)
    if type(value[0]) is int:
        return f"{TAG}ids"
    return f"{TAG}lists" if isinstance(value[0], list) else f"{TAG}many"


def _number_or_numbers(value: Any) -> str | None:
    if isinstance(value, list):
        return f"{TAG}many"
    return f"{TAG}one" if type(value) in (int, float) else None


_CHOICES = ("none", "auto", "required")


def _union(discriminator: Any, expected: str) -> Discriminator:
    return Discriminator(
        discriminator, custom_error_type="invalid_type", custom_error_message=expected
    )


def number_or_list() -> Discriminator:
    """Of a union of a number, tagged ``ONE``, and a list of them, tagged ``MANY``."""
    return _union(_number_or_numbers, "a number or an array of numbers")


def text_or_list(expected: str) -> Discriminator:
    """Of a union of a string, tagged ``ONE``, and a list, tagged ``MANY``."""
    return _union(_one_or_many, expected)


StopField = Annotated[
    Annotated[ShortString, ONE] | Annotated[Stops, MANY],
    text_or_list("a string or an array of strings"),
]


def text_part(*kinds: str) -> dict[str, Any]:
    """In the schema: a part with text whose type is one of ``kinds``."""
    return {
        "type": "object",
        "properties": {"type": {"enum": list(kinds)}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }


def parts(*kinds: str) -> Any:
    """``Field`` of a list of such parts."""
    extra: dict[str, Any] = {"items": text_part(*kinds)}
    return Field(fail_fast=True, max_length=MAX_MESSAGES, json_schema_extra=extra)


CONTENT_FORMS = text_or_list("a string or an array of content parts")
_PROMPT_FORMS = _union(
    _prompt_form, "a string, an array of strings, of token ids, or of arrays of token ids"
)
_PromptIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
_SomePrompts = Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)
_SomeInputs = Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)
PromptField = Annotated[
    Annotated[str, ONE]
    | Annotated[list[str], _SomePrompts, MANY]
    | Annotated[_PromptIds, IDS]
    | Annotated[list[_PromptIds], _SomePrompts, LISTS],
    _PROMPT_FORMS,
]
InputField = Annotated[
    Annotated[str, ONE]
    | Annotated[list[str], _SomeInputs, MANY]
    | Annotated[_PromptIds, IDS]
    | Annotated[list[_PromptIds], _SomeInputs, LISTS],
    _PROMPT_FORMS,
]


def tool_choice_field(inside: str | None) -> Any:
    """``Field`` of a choice; a tool's name stands in the object ``inside`` of it, or in itself."""
    named = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    function: dict[str, Any] = {"type": {"const": "function"}}
    function |= named["properties"] if inside is None else {inside: named}
    required: list[Any] = list(function)
    extra: dict[str, Any] = {"type": "object", "properties": function, "required": required}
    words: dict[str, Any] = {"enum": [*_CHOICES, None]}
    tools = {"type": "array", "items": extra, "minItems": 1}
    some = {"mode": {"enum": ["auto", "required"]}, "tools": tools}
    nested: dict[str, Any] = {"type": "object", "properties": some, "required": list(some)}
    allowed: dict[str, Any] = {"type": {"const": "allowed_tools"}}
    allowed |= some if inside is None else {"allowed_tools": nested}
    several = {"type": "object", "properties": allowed, "required": list(allowed)}
    return Field(json_schema_extra={"anyOf": [words, extra, several]})


def checked_tool_choice(value: Any, inside: str | None) -> Any:
    """For a validator of such a field."""
    if value is None or (isinstance(value, str) and value in _CHOICES):
        return value
    if _names_function(value, inside):
        return value
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        allowed = value if inside is None else value.get("allowed_tools")
        if isinstance(allowed, dict) and allowed.get("mode") in ("auto", "required"):
            tools = allowed.get("tools")
            if isinstance(tools, list) and all(_names_function(tool, inside) for tool in tools):
                return value
    raise PydanticCustomError(
        "unsupported_value",
        "it must be 'none', 'auto', 'required', a function with its name, or allowed_tools with a "
        "mode ('auto' or 'required') and functions with their names",
    )


def _names_function(value: Any, inside: str | None) -> bool:
    if not isinstance(value, dict) or value.get("type") != "function":
        return False
    function = value if inside is None else value.get(inside)
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def either(*schemas: dict[str, Any]) -> dict[str, Any]:
    """Says in an object's schema that at least one of ``schemas`` holds for it."""
    return {"anyOf": list(schemas)}


def both(*schemas: dict[str, Any]) -> dict[str, Any]:
    return {"allOf": list(schemas)}


def given(name: str, **schema: Any) -> dict[str, Any]:
    """The field ``name`` is there, and as ``schema`` says; without one: not null."""
    return {"required": [name], "properties": {name: schema or {"not": {"type": "null"}}}}


def absent(name: str) -> dict[str, Any]:
    return {"properties": {name: {"type": "null"}}}


def off(name: str) -> dict[str, Any]:
    """The field ``name`` is false, or not there."""
    return {"properties": {name: {"enum": [False, None]}}}


class RequestObject(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class RequestBody(RequestObject):
    """A whole body. ``REFUSED``: known fields that are not honoured, and what to do instead."""

    REFUSED: ClassVar[dict[str, str]] = {}


class ModelRequest(RequestBody):
    model: str


def missing(name: str) -> PydanticCustomError:
    """For a validator of an object that needs the field ``name`` in this case only."""
    return PydanticCustomError("missing_field", "{name}", {"name": name})


def conflict(param: str, message: str) -> PydanticCustomError:
    """For a validator of a whole object, which knows better than pydantic what is wrong."""
    return PydanticCustomError("conflict", "{message}", {"param": param, "message": message})


def prompts_of(value: Any) -> list[str] | list[list[int]]:
    """A ``PromptField``'s or ``InputField``'s prompts; a single one in a list of its own."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value
