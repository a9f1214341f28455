"""Types of request fields: bounds, lengths, and unions told apart by what a value looks like.

Lists stop at the first wrong element, so that a body full of nonsense is cheap to refuse.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from jaxllm.sampling_params import MAX_LOGPROBS

MAX_PROMPTS = 1024  # prompts of one request, and its sequences (prompts times n)
MAX_MESSAGES = 8192
MAX_STRINGS = 256
TAG = "~"  # first character of the union tags below; validation.py leaves them out of paths

INT32 = 2**31 - 1
INT64 = 2**63 - 1

Strings = Annotated[list[str], Field(fail_fast=True, max_length=MAX_STRINGS)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_STRINGS)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
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


def _union(discriminator: Any, expected: str) -> Discriminator:
    return Discriminator(
        discriminator, custom_error_type="invalid_type", custom_error_message=expected
    )


StringOrStrings = Annotated[
    Annotated[str, Tag(f"{TAG}one")] | Annotated[Strings, Tag(f"{TAG}many")],
    _union(_one_or_many, "a string or an array of strings"),
]
Content = Annotated[
    Annotated[str, Tag(f"{TAG}one")]
    | Annotated[
        list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_MESSAGES), Tag(f"{TAG}many")
    ],
    _union(_one_or_many, "a string or an array of content parts"),
]
PromptField = Annotated[
    Annotated[str, Tag(f"{TAG}one")]
    | Annotated[
        list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag(f"{TAG}many")
    ]
    | Annotated[TokenIds, Tag(f"{TAG}ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS), Tag(f"{TAG}lists")],
    _union(_prompt_form, "a string, an array of strings, of token ids, or of arrays of token ids"),
]


class RequestObject(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
