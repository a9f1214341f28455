"""What /v1/responses takes: its fields, and its input as messages for the model's template."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jaxllm.grammar.structured_outputs import StructuredOutputsParams
from jaxllm.sampling_params import SamplingParams
from server.openai import refused
from server.openai.conversation import ChatMessage, TemplateOptions
from server.openai.fields import (
    CONTENT_FORMS,
    INT32,
    MANY,
    MAX_MESSAGES,
    MAX_TOOLS,
    ONE,
    Count,
    LogprobCount,
    RequestObject,
    both,
    checked_tool_choice,
    either,
    given,
    missing,
    parts,
    text_or_list,
    tool_choice_field,
)
from server.openai.schemas import SamplingRequest, StreamOptions
from server.openai.structured import TextFormat

LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


_Parts = Annotated[list[dict[str, Any]], parts("input_text", "output_text", "text"), MANY]
Content = Annotated[Annotated[str, ONE] | _Parts, CONTENT_FORMS]


def _kinds() -> dict[str, Any]:
    """In the schema: what each kind of item needs."""
    kinds: list[dict[str, Any]] = []
    for kind, names in _NEEDED.items():
        needed = [given("type", const=kind), *map(given, names)]
        if kind == "message":  # which nobody needs to say
            needed[0] = {"properties": {"type": {"enum": [kind, None]}}}
        kinds.append(both(*needed))
    return either(*kinds)


class InputItem(RequestObject):
    """A message, or what was said about a call of a function. Reasoning is not shown again."""

    model_config = ConfigDict(json_schema_extra=_kinds())

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind not in _NEEDED:
            raise PydanticCustomError(
                "unsupported_value",
                "items of type '{kind}' are not supported; supported are {known}",
                {"kind": self.kind[:64], "known": ", ".join(_NEEDED)},
            )
        for name in _NEEDED[self.kind]:
            if getattr(self, name) is None:
                raise missing(name)
        for part in self.content if isinstance(self.content, list) else ():
            _check_part(part)
        for part in self.output if isinstance(self.output, list) else ():
            _check_part(part)
        return self

    @property
    def kind(self) -> str:
        return self.type or "message"


class FunctionTool(RequestObject):
    type: Annotated[str, Field(json_schema_extra={"const": "function"})]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("type")
    @classmethod
    def _only_functions(cls, value: str) -> str:
        if value != "function":
            raise PydanticCustomError(
                "unsupported_value",
                "this server has no tools of its own; supported is 'function'",
            )
        return value

    def as_object(self) -> dict[str, Any]:
        """As an answer shows it again."""
        return self.model_dump(include=set(type(self).model_fields))

    def as_template_tool(self) -> dict[str, Any]:
        """As chat completions have it, and so templates."""
        function: dict[str, Any] = {"name": self.name, "description": self.description or ""}
        function |= {"parameters": self.parameters or {"type": "object", "properties": {}}}
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class ReasoningOptions(RequestObject):
    """``max_tokens`` is OpenRouter's name of vLLM's ``thinking_token_budget``."""

    effort: Annotated[str, Field(max_length=32)] | None = None
    max_tokens: Count | None = None


class TextOptions(RequestObject):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


InputItems = Annotated[
    list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
]


class ResponsesRequest(SamplingRequest):
    REFUSED: ClassVar[dict[str, str]] = refused.RESPONSE

    input: Annotated[
        Annotated[str, ONE] | Annotated[InputItems, MANY],
        text_or_list("a string or an array of items"),
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    top_logprobs: LogprobCount | None = None
    reasoning: ReasoningOptions | None = None
    thinking_token_budget: Count | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Any, tool_choice_field(None)] = None
    max_tool_calls: int | None = None
    truncation: Literal["disabled"] | None = None
    stream_options: StreamOptions | None = None

    @field_validator("tool_choice")
    @classmethod
    def _known_choice(cls, value: Any) -> Any:
        return checked_tool_choice(value, None)

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def sampling_params(self, defaults: Mapping[str, float]) -> SamplingParams:
        """Raises InvalidRequestError for values that do not go together."""
        budget = self.thinking_token_budget
        if budget is None and self.reasoning is not None:
            budget = self.reasoning.max_tokens
        return self._sampling_params(
            defaults,
            max_tokens=self.max_output_tokens,
            thinking_token_budget=budget,
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
        )

    def text_format(self) -> dict[str, Any]:
        """As the answer repeats it."""
        asked = None if self.text is None else self.text.format
        if asked is None or asked.type == "text":
            return {"type": "text"}
        return asked.model_dump(by_alias=True, exclude_none=True)

    def _structured_outputs(self) -> list[StructuredOutputsParams]:
        found = super()._structured_outputs()
        if self.text is not None and self.text.format is not None:
            params = self.text.format.params("text.format")
            found += [] if params is None else [params]
        return found

    def template_options(self) -> TemplateOptions:
        effort = None if self.reasoning is None else self.reasoning.effort
        tools = [tool.as_template_tool() for tool in self.tools or ()]
        choice = self.tool_choice
        if isinstance(choice, dict):
            choice = _as_chat_choice(choice)
        return TemplateOptions(reasoning_effort=effort, tools=tools or None, tool_choice=choice)

    def messages(self) -> list[dict[str, Any]]:
        """As ``ChatMessage.as_template_message`` gives them, instructions first."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
            return messages
        for item in self.input:
            _add(messages, item)
        return messages


def _as_chat_choice(choice: dict[str, Any]) -> dict[str, Any]:
    """As chat completions have it."""
    if choice["type"] == "allowed_tools":
        tools = [_as_chat_choice(tool) for tool in choice["tools"]]
        allowed = {"mode": choice["mode"], "tools": tools}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return {"type": "function", "function": {"name": choice["name"]}}


def _add(messages: list[dict[str, Any]], item: InputItem) -> None:
    """Calls belong to the assistant's message before them."""
    if item.kind == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        message = ChatMessage(role="assistant", tool_calls=[call]).as_template_message()
        messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
    elif item.kind == "function_call_output":
        content = _text_of(item.output)
        messages.append({"role": "tool", "content": content, "tool_call_id": item.call_id})
    elif item.kind == "message":
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": _text_of(item.content)})


def _check_part(part: dict[str, Any]) -> None:
    kind = part.get("type")
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise PydanticCustomError(
            "unsupported_content_type",
            "a part of type '{kind}' is not text, and this model takes only text",
            {"kind": str(kind)[:64]},
        )


def _text_of(content: str | list[dict[str, Any]] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    return "\n".join(part["refusal" if part["type"] == "refusal" else "text"] for part in content)
