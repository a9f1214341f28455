# pyright: reportMissingImports=false
"""llama-index-llms-openai-like: chat and completion; with ``rows``, what it makes of errors."""

import json
import sys

import openai
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

given = json.load(sys.stdin)
told = {}


def language_model(row: dict | None = None) -> OpenAILike:
    named = {} if row is None else {"default_headers": {"X-Request-Id": row["request_id"]}}
    return OpenAILike(
        api_base=given["url"],
        api_key=row["key"] if row else "none",
        model=row["body"]["model"] if row else given["model"],
        is_chat_model=True,
        context_window=512,
        temperature=0,
        max_tokens=12,
        max_retries=2,
        **named,
    )


def message(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


if "rows" not in given:
    model = language_model()
    asked = message(given["messages"][0]["content"])
    told["chat"] = model.chat(asked).message.content
    told["chat_stream"] = "".join(piece.delta or "" for piece in model.stream_chat(asked))
    model.is_chat_model = False
    told["completion"] = model.complete("Paris is the capital of").text
    pieces = model.stream_complete("Paris is the capital of")
    told["completion_stream"] = "".join(piece.delta or "" for piece in pieces)
for row in given.get("rows", ()):
    asked = message(row["body"]["messages"][0]["content"])
    try:
        if row["body"].get("stream"):
            list(language_model(row).stream_chat(asked))
        else:
            language_model(row).chat(asked)
        told[row["name"]] = ""
    except openai.APIError as error:
        told[row["name"]] = [kind.__name__ for kind in type(error).__mro__]
print(json.dumps(told))
