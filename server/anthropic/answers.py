"""What answers look like: for the OpenAPI document and for tests of real ones."""

from typing import Any, Literal

from server.openai.answers import Answer, TapObject


class TextBlock(Answer):
    type: Literal["text"]
    text: str


class ThinkingBlock(Answer):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(Answer):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Answer):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class Message(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage
    taps: dict[str, TapObject] | None = None


class TokenCount(Answer):
    input_tokens: int


class AnthropicErrorObject(Answer):
    type: str
    message: str


class AnthropicErrorAnswer(Answer):
    type: Literal["error"]
    error: AnthropicErrorObject
    request_id: str
