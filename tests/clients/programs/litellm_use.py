# pyright: reportMissingImports=false
"""litellm, by both of its names for a server like this; with ``rows``, what it makes of errors."""

import json
import sys

import litellm
import openai

given = json.load(sys.stdin)
litellm.suppress_debug_info = True
told = {}


def ask(provider: str, model: str, key: str, messages: list, **more: object):
    return litellm.completion(
        model=f"{provider}/{model}",
        api_base=given["url"],
        api_key=key,
        messages=messages,
        temperature=0,
        max_tokens=12,
        max_retries=2,
        **more,
    )


for provider in () if "rows" in given else ("openai", "hosted_vllm"):
    arguments = (provider, given["model"], "none", given["messages"])
    told[f"chat {provider}"] = ask(*arguments).choices[0].message.content
    pieces = ask(*arguments, stream=True)
    told[f"chat_stream {provider}"] = "".join(p.choices[0].delta.content or "" for p in pieces)
    vectors = litellm.embedding(
        model=f"{provider}/{given['model']}",
        api_base=given["url"],
        api_key="none",
        input=["one", "two"],
        encoding_format="float",
    )
    told[f"embeddings {provider}"] = [len(item["embedding"]) for item in vectors.data]
for row in given.get("rows", ()):
    body = row["body"]
    streamed = bool(body.get("stream"))
    named = {"X-Request-Id": row["request_id"]}
    try:
        answer = ask(
            "openai",
            body["model"],
            row["key"],
            body["messages"],
            stream=streamed,
            extra_headers=named,
        )
        if streamed:
            list(answer)
        told[row["name"]] = ""
    except openai.APIError as error:
        told[row["name"]] = [kind.__name__ for kind in type(error).__mro__]
print(json.dumps(told))
