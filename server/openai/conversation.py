"""Messages, and how the model's own template writes them as one prompt."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jaxllm.errors import InvalidRequestError
from jaxllm.parsers.describe import described, in_words
from jaxllm.tokenizer.tokenizer import Tokenizer
from server.openai.fields import (
    CONTENT_FORMS,
    MANY,
    MAX_MESSAGES,
    ONE,
    RequestObject,
    Tools,
    checked_tool_choice,
    conflict,
    either,
    given,
    missing,
    off,
    parts,
    tool_choice_field,
)
from server.openai.json_text import parse_json
from server.serving import Serving, aside
from server.tool_choice import ToolChoice

LONG_CHARS = 20_000  # beyond it, rendering or encoding would hold up the event loop

# Names that templates are given by us, not by a request.
_OWN_NAMES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "raise_exception",
        "strftime_now",
    }
)


_Parts = Annotated[list[dict[str, Any]], parts("text", "input_text"), MANY]
Content = Annotated[Annotated[str, ONE] | _Parts, CONTENT_FORMS]


class ChatMessage(RequestObject):
    model_config = ConfigDict(
        json_schema_extra=either(given("role", const="assistant"), given("content"))
    )

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    tool_calls: Tools | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the newer name of the same

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise missing("content")
        return self

    def as_template_message(self) -> dict[str, Any]:
        """As templates know it: ``system`` for OpenAI's newer word ``developer``, always a content,
        a call's arguments as an object.
        """
        message = self.model_dump(exclude_unset=True)
        role = "system" if self.role == "developer" else self.role
        message |= {"role": role, "content": self.content or ""}
        thoughts = self.reasoning_content or message.pop("reasoning", None)
        if thoughts:
            message["reasoning_content"] = thoughts
        if self.tool_calls:
            message["tool_calls"] = [with_arguments(call) for call in self.tool_calls]
        return message


Messages = Annotated[
    list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
]


ONE_END = either(off("continue_final_message"), off("add_generation_prompt"))
_OTHER_NAMES: dict[str, Any] = {
    "not": {"anyOf": [{"enum": sorted(_OWN_NAMES)}, {"pattern": "_token$"}]}
}
_Variables = Annotated[
    dict[str, str | int | float | bool | None],
    Field(json_schema_extra={"propertyNames": _OTHER_NAMES}),
]


class TemplateOptions(RequestObject):
    """What a request may say about the prompt that is made of its messages."""

    model_config = ConfigDict(json_schema_extra=ONE_END)

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: _Variables | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    tools: Tools | None = None
    tool_choice: Annotated[Any, tool_choice_field("function")] = None

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _only_own_names(cls, value: Any) -> Any:
        for name, item in value.items() if isinstance(value, dict) else ():
            if name in _OWN_NAMES or str(name).endswith("_token"):
                raise PydanticCustomError(
                    "unsupported_value",
                    "a request cannot set the template's variable '{name}'",
                    {"name": str(name)[:64]},
                )
            if item is not None and not isinstance(item, str | int | float):
                raise PydanticCustomError(
                    "unsupported_value", "values must be strings, numbers, booleans or null"
                )
        return value

    @field_validator("tool_choice")
    @classmethod
    def _known_choice(cls, value: Any) -> Any:
        return checked_tool_choice(value, "function")

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise conflict("continue_final_message", "it needs add_generation_prompt to be false")
        return self

    def chosen_tools(self) -> ToolChoice:
        """Raises InvalidRequestError: a call is required of what is not there."""
        return ToolChoice.of(self.tools, self.tool_choice)

    def template_variables(self) -> dict[str, Any]:
        """For the template itself; it may know none of them."""
        given = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            given.setdefault("reasoning_effort", self.reasoning_effort)
        return given


async def render(
    messages: list[dict[str, Any]],
    options: TemplateOptions,
    serving: Serving,
    *,
    param: str = "messages",
) -> str:
    """The prompt; a long one is written in a thread. Variables that the template does not read are
    told to the operator once.

    Raises:
        InvalidRequestError: there is no template, or it refuses these messages, which came in the
            field ``param``.
    """
    tokenizer = serving.client.tokenizer
    form = serving.parsers.calling().tool
    forced = options.chosen_tools().required
    if messages and forced and form and "tools" not in _variables_of(tokenizer):
        messages = _with_tools(messages, described(form.form, options.tools or ()))
    variables = options.template_variables()
    unread = variables.keys() - _variables_of(tokenizer)
    serving.note_ignored(f"chat_template_kwargs.{name}" for name in unread)
    continues, generates = bool(options.continue_final_message), options.add_generation_prompt
    arguments = {name: value for name, value in variables.items() if name not in unread} | {
        "add_generation_prompt": not continues if generates is None else generates,
        "continue_final_message": continues,
        "tools": None if options.tool_choice == "none" else options.tools or None,
    }

    def written() -> str:
        told = messages
        if form and _knows_no_calls(tokenizer) and any(map(_of_tools, messages)):
            told = in_words(messages, form.form)
        return tokenizer.apply_chat_template(told, **arguments)

    try:
        return await aside(_may_be_long(messages, options.tools), written)
    except InvalidRequestError as error:
        if error.param == "messages":
            error.param = param
        raise


def _knows_no_calls(tokenizer: Tokenizer) -> bool:
    template = tokenizer.chat_template
    return template is not None and "tool_calls" not in template.text


def _of_tools(message: dict[str, Any]) -> bool:
    return "tool_calls" in message or message["role"] in ("tool", "function")


def _with_tools(messages: list[dict[str, Any]], tools: str) -> list[dict[str, Any]]:
    """Behind what the system says, or as its only words."""
    first = messages[0]
    if first["role"] != "system" or not isinstance(first["content"], str):
        return [{"role": "system", "content": tools}, *messages]
    return [first | {"content": f"{first['content']}\n\n{tools}".strip()}, *messages[1:]]


def _may_be_long(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> bool:
    """Tools and calls are not measured, which would take as long as writing them."""
    if tools or any("tool_calls" in message for message in messages):
        return True
    return sum(len(str(message["content"])) for message in messages) > LONG_CHARS


def _variables_of(tokenizer: Tokenizer) -> frozenset[str]:
    template = tokenizer.chat_template
    return frozenset[str]() if template is None else template.variables


class _Arguments(dict[str, Any]):
    """A call's arguments as an object; for templates that add them to text (DeepSeek's), as the
    text that they came in.
    """

    def __init__(self, arguments: dict[str, Any], text: str):
        super().__init__(arguments)
        self._text = text or "{}"

    def __radd__(self, before: str) -> str:
        return before + self._text


def with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI writes a call's arguments as JSON text, templates as what it says. Text that is not
    JSON, as a model may write it, or too deep to walk through, stays text.
    """
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments, str):
        return call
    try:
        parsed = parse_json(arguments.encode()) if arguments else {}
    except InvalidRequestError:
        return call
    if isinstance(parsed, dict):
        parsed = _Arguments(parsed, arguments)
    return call | {"function": {**function, "arguments": parsed}}
