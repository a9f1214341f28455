"""``taps`` and ``interventions``: activations that an answer brings, and what a request changes."""

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from jaxllm.outputs import Tap
from jaxllm.taps.interventions import AblateHead, Intervention, Patch, Steer
from jaxllm.taps.positions import MAX_POSITIONS
from jaxllm.taps.sites import KINDS, MAX_SITES
from server.openai.fields import INT32, MANY, ONE, TAG, RequestObject, conflict, text_or_list

_MAX_NUMBERS = 2**16  # of a vector
_STEER, _PATCH, _ABLATE = "steer", "patch", "ablate_head"


def _checked(text: str) -> str:
    try:
        valid = len(base64.b64decode(text, validate=True)) % 4 == 0
    except ValueError:
        valid = False
    if not valid:
        raise PydanticCustomError("invalid_value", "it must be the base64 of float32 numbers")
    return text


def _numbers(vector: str | list[float]) -> bytes | list[float]:
    return base64.b64decode(vector) if isinstance(vector, str) else vector


Base64 = Annotated[
    str,
    Field(max_length=6 * _MAX_NUMBERS, json_schema_extra={"contentEncoding": "base64"}),
    AfterValidator(_checked),
]
Vector = Annotated[
    Annotated[Base64, ONE]
    | Annotated[list[float], Field(fail_fast=True, min_length=1, max_length=_MAX_NUMBERS), MANY],
    text_or_list("an array of numbers or a base64 string"),
]
Index = Annotated[int, Field(ge=0, le=INT32)]


class SteerField(RequestObject):
    type: Literal["steer"]
    layer: Index
    vector: Vector
    coefficient: float = 1.0
    first: Index = 0
    last: Index = INT32

    def made(self) -> Steer:
        return Steer(self.layer, _numbers(self.vector), self.coefficient, self.first, self.last)


class PatchField(RequestObject):
    type: Literal["patch"]
    layer: Index
    position: Index
    vector: Vector

    def made(self) -> Patch:
        return Patch(self.layer, self.position, _numbers(self.vector))


class AblateHeadField(RequestObject):
    type: Literal["ablate_head"]
    layer: Index
    head: Index

    def made(self) -> AblateHead:
        return AblateHead(self.layer, self.head)


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"{TAG}{kind}" if kind in (_STEER, _PATCH, _ABLATE) else None


InterventionField = Annotated[
    Annotated[SteerField, Tag(f"{TAG}{_STEER}")]
    | Annotated[PatchField, Tag(f"{TAG}{_PATCH}")]
    | Annotated[AblateHeadField, Tag(f"{TAG}{_ABLATE}")],
    Discriminator(
        _kind,
        custom_error_type="invalid_type",
        custom_error_message="an object with a type of 'steer', 'patch' or 'ablate_head'",
    ),
]
Interventions = Annotated[list[InterventionField], Field(fail_fast=True, max_length=MAX_SITES)]
TapName = Annotated[
    str,
    Field(
        max_length=32,
        json_schema_extra={"pattern": rf"^({'|'.join(KINDS)})\.[0-9]{{1,5}}$"},
    ),
]
TapNames = Annotated[list[TapName], Field(fail_fast=True, max_length=MAX_SITES)]
TapPositionsField = Annotated[
    Annotated[Literal["last", "all"], ONE]
    | Annotated[
        list[Annotated[int, Field(ge=-INT32, le=INT32)]],
        Field(fail_fast=True, min_length=1, max_length=MAX_POSITIONS),
        MANY,
    ],
    text_or_list("'last', 'all' or an array of positions"),
]


def made(interventions: Sequence[InterventionField] | None) -> list[Intervention] | None:
    """Raises InvalidRequestError for what no model could take."""
    return None if interventions is None else [item.made() for item in interventions]


def check_alone(taps: Sequence[str] | None, stream: bool | None, num_sequences: int) -> None:
    """Taps are large: an answer brings one request's, at its end."""
    if taps and stream:
        raise conflict("taps", "it is not available when stream is true")
    if taps and num_sequences > 1:
        raise conflict("taps", "it takes one prompt and n of 1")


def taps_object(taps: Mapping[str, Tap]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "positions": tap.positions,
            "shape": list(tap.values.shape),
            "data": base64.b64encode(tap.values.astype("<f4").tobytes()).decode(),
        }
        for name, tap in taps.items()
    }
