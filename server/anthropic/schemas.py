"""What /v1/messages and /v1/messages/count_tokens take. Names are Anthropic's, or vLLM's."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jaxllm.grammar.structured_outputs import StructuredOutputsParams
from jaxllm.sampling_params import SamplingParams
from server.openai import refused
from server.openai.fields import (
    CONTENT_FORMS,
    INT32,
    MANY,
    MAX_MESSAGES,
    MAX_TOOLS,
    ONE,
    ModelRequest,
    RequestObject,
    Stops,
    either,
    given,
    missing,
    parts,
    text_or_list,
    text_part,
)
from server.openai.schemas import SamplingRequest

MAX_BLOCKS = 128  # of one message
Content = Annotated[
    Annotated[str, ONE] | Annotated[list[dict[str, Any]], parts("text"), MANY], CONTENT_FORMS
]


class Block(RequestObject):
    """A part of a message's content; ``type`` says which fields it has."""

    model_config = ConfigDict(
        json_schema_extra=either({"not": given("type", const="text")}, given("text"))
    )

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Content | None = None  # of a tool's result


def _blocks(**schema: Any) -> Any:
    return Field(fail_fast=True, max_length=MAX_BLOCKS, json_schema_extra=schema or None)


_TEXT = text_or_list("a string or an array of content blocks")
Blocks = Annotated[Annotated[str, ONE] | Annotated[list[Block], _blocks(), MANY], _TEXT]
TextBlocks = Annotated[
    Annotated[str, ONE] | Annotated[list[Block], _blocks(items=text_part("text")), MANY], _TEXT
]


def _said_by(role: str, *kinds: str) -> dict[str, Any]:
    """In the schema: the blocks that a message of ``role`` may hold."""
    blocks = {"items": {"properties": {"type": {"enum": list(kinds)}}}}
    return {"properties": {"role": {"const": role}, "content": blocks}}


class AnthropicMessage(RequestObject):
    model_config = ConfigDict(
        json_schema_extra=either(
            _said_by("user", "text", "tool_result"),
            _said_by("assistant", "text", "tool_use", "thinking", "redacted_thinking"),
            _said_by("system", "text"),
        )
    )

    role: Literal["user", "assistant", "system"]
    content: Blocks


class AnthropicTool(RequestObject):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: Annotated[str, Field(json_schema_extra={"const": "custom"})] | None = None
    strict: bool | None = None

    @field_validator("type")
    @classmethod
    def _only_own(cls, value: str | None) -> str | None:
        if value not in (None, "custom"):
            raise PydanticCustomError("unsupported_value", "this server brings no tools of its own")
        return value


class ToolChoice(RequestObject):
    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    model_config = ConfigDict(
        json_schema_extra=either(
            {"properties": {"type": {"enum": ["auto", "none", "any"]}}}, given("name")
        )
    )

    @model_validator(mode="after")
    def _has_name(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise missing("name")
        return self

    def as_openai(self) -> Any:
        """In the form of chat completions."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(RequestObject):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None


class OutputFormat(RequestObject):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(RequestObject):
    effort: Annotated[str, Field(max_length=32)] | None = None
    format: OutputFormat | None = None


class ConversationRequest(ModelRequest):
    messages: Annotated[
        list[AnthropicMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    ]
    system: TextBlocks | None = None
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class CountTokensRequest(ConversationRequest):
    pass


class MessagesRequest(ConversationRequest, SamplingRequest):
    REFUSED: ClassVar[dict[str, str]] = refused.WITHOUT_BEAMS | {
        "container": "this server runs no code",
        "mcp_servers": "this server works alone",
    }

    max_tokens: Annotated[int, Field(ge=1, le=INT32)]
    stop_sequences: Stops | None = None

    def sampling_params(self, defaults: Mapping[str, float], *, thinks: bool) -> SamplingParams:
        """Where nobody knows how the model ``thinks``, a budget for that ends nothing; Anthropic's
        clients have to send one.

        Raises:
            InvalidRequestError: values do not go together.
        """
        overrides: dict[str, Any] = {"max_tokens": self.max_tokens}
        if self.stop_sequences:
            overrides["stop"] = self.stop_sequences
        if thinks and self.thinking is not None and self.thinking.type == "enabled":
            overrides["thinking_token_budget"] = self.thinking.budget_tokens
        return self._sampling_params(defaults, **overrides)

    def _structured_outputs(self) -> list[StructuredOutputsParams]:
        found = super()._structured_outputs()
        asked = None if self.output_config is None else self.output_config.format
        if asked is not None:
            param = "output_config.format"
            found.append(StructuredOutputsParams(json=asked.schema_, param=param, closes=True))
        return found
