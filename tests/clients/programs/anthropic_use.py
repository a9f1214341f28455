# pyright: reportMissingImports=false
"""anthropic: messages whole and streamed, and calls of tools that must come."""

import json
import sys

import anthropic

given = json.load(sys.stdin)
plain = {"model": given["model"], "messages": given["messages"]}
plain["extra_body"] = {"temperature": 0}  # which the client itself no longer has
tools = [{"name": name, "input_schema": schema} for name, schema in given["tools"].items()]
told = {}


def calls(message: anthropic.types.Message) -> list[tuple[str, object]]:
    return [(block.name, block.input) for block in message.content if block.type == "tool_use"]


with anthropic.Anthropic(base_url=given["url"], api_key="none", max_retries=0) as client:
    whole = client.messages.create(max_tokens=12, **plain)
    told["text"] = whole.content[0].text
    with client.messages.stream(max_tokens=12, **plain) as stream:
        told["text_stream"] = "".join(stream.text_stream)
    told["tokens"] = whole.usage.output_tokens

    one = {"type": "any", "disable_parallel_tool_use": True}
    asked = plain | {"tools": tools, "tool_choice": one, "max_tokens": 64}
    called = client.messages.create(**asked)
    told["any"], told["any_reason"] = calls(called), called.stop_reason
    with client.messages.stream(**asked) as stream:
        told["any_stream"] = calls(stream.get_final_message())
    for name in given["tools"]:
        asked["tool_choice"] = {"type": "tool", "name": name}
        told[f"named {name}"] = calls(client.messages.create(**asked))
print(json.dumps(told))
