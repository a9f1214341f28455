"""What the text of an answer must look like: fields of OpenAI's, of vLLM's and of older vLLM's.

All of them end as ``StructuredOutputsParams``, which knows the field it came from.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from jaxllm.grammar.structured_outputs import KINDS, MAX_CHOICES, StructuredOutputsParams
from server.openai.fields import ONE, TAG, RequestObject, either, given, missing

GUIDED = {  # names of vLLM before structured_outputs -> what they are now
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_OBJECT = f"{TAG}object"


def _text_or_object(value: Any) -> str | None:
    if isinstance(value, str):
        return f"{TAG}one"
    return _OBJECT if isinstance(value, dict) else None


NotEmpty = Annotated[str, Field(min_length=1)]
Schema = Annotated[
    Annotated[NotEmpty, ONE] | Annotated[dict[str, Any], Tag(_OBJECT)],
    Discriminator(
        _text_or_object,
        custom_error_type="invalid_type",
        custom_error_message="an object or a string",
    ),
]
Choices = Annotated[list[NotEmpty], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]


def _exactly_one() -> dict[str, Any]:
    asked = {
        kind: given(kind, const=True) if kind == "json_object" else given(kind) for kind in KINDS
    }
    return {"oneOf": list(asked.values())}


class StructuredOutputs(RequestObject):
    """vLLM's ``structured_outputs``: exactly one of the first six."""

    model_config = ConfigDict(json_schema_extra=_exactly_one())

    # "json" would hide a method of pydantic's.
    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: NotEmpty | None = None
    choice: Choices | None = None
    grammar: NotEmpty | None = None
    json_object: bool | None = None
    structural_tag: Schema | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: NotEmpty | None = None

    def params(self) -> StructuredOutputsParams:
        """Raises InvalidRequestError."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name != "json_"}
        chosen = {name: value for name, value in given.items() if value is not None}
        return StructuredOutputsParams(json=self.json_, **chosen)


def _of_type(*types: str) -> dict[str, Any]:
    return {"properties": {"type": {"enum": list(types)}}}


class JSONSchema(RequestObject):
    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None  # the schema is followed either way


class TextFormat(JSONSchema):
    """``text.format`` of /v1/responses."""

    model_config = ConfigDict(
        json_schema_extra=either(_of_type("text", "json_object"), given("schema"))
    )

    type: Literal["text", "json_object", "json_schema"]

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise missing("schema")
        return self

    def params(self, param: str) -> StructuredOutputsParams | None:
        """None for plain text. Raises InvalidRequestError."""
        return _format_params(self.type, self, param)


class ResponseFormat(RequestObject):
    """``response_format`` of completions; the type structural_tag is vLLM's."""

    model_config = ConfigDict(
        json_schema_extra=either(
            _of_type("text", "json_object", "structural_tag"),
            given("json_schema", type="object", **given("schema")),
        )
    )

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JSONSchema | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise missing("json_schema")
        if self.type == "json_schema" and self.json_schema and self.json_schema.schema_ is None:
            raise missing("json_schema.schema")
        return self

    def params(self, param: str) -> StructuredOutputsParams | None:
        """None for plain text. Raises InvalidRequestError."""
        if self.type == "structural_tag":
            tag = {"structures": self.structures or [], "triggers": self.triggers or []}
            return StructuredOutputsParams(structural_tag=tag, param=param)
        return _format_params(self.type, self.json_schema, param)


def _format_params(
    kind: str, schema: JSONSchema | None, param: str
) -> StructuredOutputsParams | None:
    if kind == "json_schema" and schema is not None:
        return StructuredOutputsParams(json=schema.schema_, param=param, closes=True)
    return StructuredOutputsParams(json_object=True, param=param) if kind == "json_object" else None


def guided_params(
    given: dict[str, Any], whitespace_pattern: str | None
) -> list[StructuredOutputsParams]:
    """Of the fields in ``GUIDED`` that are there. Raises InvalidRequestError."""
    return [
        StructuredOutputsParams(
            **{GUIDED[name]: value}, whitespace_pattern=whitespace_pattern, param=name
        )
        for name, value in given.items()
        if value is not None
    ]


def only_one(found: list[StructuredOutputsParams]) -> StructuredOutputsParams | None:
    """Raises InvalidRequestError: two fields ask for two things."""
    if len(found) > 1:
        raise found[1].invalid(f"it cannot go with '{found[0].param}'")
    return found[0] if found else None
