"""Anthropic's messages and tools as the model's template knows them."""

from typing import Any

from jaxllm.errors import InvalidRequestError
from server.anthropic.schemas import AnthropicMessage, Block, ConversationRequest
from server.openai.conversation import TemplateOptions, with_arguments
from server.responses import encode_json


def template_messages(body: ConversationRequest) -> list[dict[str, Any]]:
    """As ``ChatMessage.as_template_message`` gives them, the system's first.

    Raises:
        InvalidRequestError: a block is of a kind that this model cannot read.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for index, message in enumerate(body.messages):
        where = f"messages[{index}].content"
        if message.role == "system":
            messages.append({"role": "system", "content": _text(message.content, where)})
            continue
        add = _add_assistant if message.role == "assistant" else _add_user
        add(messages, message, where)
    return messages


def template_options(body: ConversationRequest) -> TemplateOptions:
    """A last message of the assistant is continued."""
    chosen = body.tool_choice.as_openai() if body.tool_choice is not None else "auto"
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema or {"type": "object", "properties": {}},
                **({} if tool.strict is None else {"strict": tool.strict}),
            },
        }
        for tool in body.tools or ()
    ]
    variables: dict[str, str | int | float | bool | None] = {}
    if body.thinking is not None:
        variables["enable_thinking"] = body.thinking.type != "disabled"
    effort = None if body.output_config is None else body.output_config.effort
    return TemplateOptions(
        tools=tools or None,
        tool_choice=chosen,
        chat_template_kwargs=variables,
        reasoning_effort=effort,
        continue_final_message=body.messages[-1].role == "assistant" or None,
    )


def _add_user(messages: list[dict[str, Any]], message: AnthropicMessage, where: str) -> None:
    """Results of tools are messages of their own, before the text."""
    if isinstance(message.content, str):
        messages.append({"role": "user", "content": message.content})
        return
    texts: list[str] = []
    for index, block in enumerate(message.content):
        if block.type == "tool_result":
            content = _text(block.content or "", f"{where}[{index}].content")
            result = {"role": "tool", "content": content, "tool_call_id": block.tool_use_id}
            messages.append(result)
        else:
            texts.append(_text_of(block, f"{where}[{index}]"))
    if texts:
        messages.append({"role": "user", "content": "\n".join(texts)})


def _add_assistant(messages: list[dict[str, Any]], message: AnthropicMessage, where: str) -> None:
    blocks = message.content
    if isinstance(blocks, str):
        messages.append({"role": "assistant", "content": blocks})
        return
    texts: list[str] = []
    added: dict[str, Any] = {"role": "assistant"}
    for index, block in enumerate(blocks):
        if block.type == "tool_use":
            arguments = encode_json(block.input or {}).decode()
            function = {"name": block.name or "", "arguments": arguments}
            call = {"id": block.id, "type": "function", "function": function}
            added.setdefault("tool_calls", []).append(with_arguments(call))
        elif block.type == "thinking":
            added["reasoning_content"] = block.thinking or ""
        elif block.type != "redacted_thinking":
            texts.append(_text_of(block, f"{where}[{index}]"))
    messages.append(added | {"content": "\n".join(texts)})


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else [content]
    texts: list[str] = []
    for index, block in enumerate(blocks):
        if isinstance(block, dict):
            text = block.get("text") if block.get("type") == "text" else None
            block = Block(type=str(block.get("type")), text=text if isinstance(text, str) else None)
        texts.append(_text_of(block, f"{where}[{index}]"))
    return "\n".join(texts)


def _text_of(block: Any, where: str) -> str:
    if isinstance(block, Block) and block.type == "text" and block.text is not None:
        return block.text
    kind = block.type[:64] if isinstance(block, Block) else type(block).__name__
    raise InvalidRequestError(
        f"{where}: a block of type {kind!r} is not text, and this model takes only text.",
        param=where,
        code="unsupported_content_type",
    )
