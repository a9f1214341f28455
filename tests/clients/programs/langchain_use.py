# pyright: reportMissingImports=false
"""langchain-openai: a chat model and embeddings; with ``rows``, what it makes of errors."""

import json
import sys

import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

given = json.load(sys.stdin)
told = {}


def chat_model(row: dict | None = None) -> ChatOpenAI:
    named = {} if row is None else {"default_headers": {"X-Request-Id": row["request_id"]}}
    return ChatOpenAI(
        base_url=given["url"],
        api_key=row["key"] if row else "none",
        model=row["body"]["model"] if row else given["model"],
        temperature=0,
        max_tokens=12,
        **named,
    )


if "rows" not in given:
    model = chat_model()
    content = given["messages"][0]["content"]
    answer = model.invoke(content)
    told["chat"], told["usage"] = answer.content, answer.usage_metadata["output_tokens"]
    told["chat_stream"] = "".join(chunk.content for chunk in model.stream(content))
    embedder = OpenAIEmbeddings(
        base_url=given["url"],
        api_key="none",
        model=given["model"],
        check_embedding_ctx_length=False,  # it would fetch a tokenizer
    )
    told["embeddings"] = [len(vector) for vector in embedder.embed_documents(["one", "two"])]
for row in given.get("rows", ()):
    content = row["body"]["messages"][0]["content"]
    try:
        if row["body"].get("stream"):
            list(chat_model(row).stream(content))
        else:
            chat_model(row).invoke(content)
        told[row["name"]] = ""
    except openai.APIError as error:
        told[row["name"]] = [kind.__name__ for kind in type(error).__mro__]
print(json.dumps(told))
