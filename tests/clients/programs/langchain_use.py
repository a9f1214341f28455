# pyright: reportMissingImports=false
"""langchain-openai: a chat model, tools and embeddings; with ``rows``, what it makes of errors."""

import json
import sys
from typing import Literal

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

given = json.load(sys.stdin)
told = {}


@tool
def get_weather(city: Literal["Paris", "London"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return f"Sunny in {city} for {days} days."


class Trip(BaseModel):
    city: Literal["Paris", "London"]
    days: Literal[1, 2, 3]


def called(message) -> list:
    return [[call["name"], call["args"]] for call in message.tool_calls]


def chat_model(row: dict | None = None, max_tokens: int = 12) -> ChatOpenAI:
    named = {} if row is None else {"default_headers": {"X-Request-Id": row["request_id"]}}
    return ChatOpenAI(
        base_url=given["url"],
        api_key=row["key"] if row else "none",
        model=row["body"]["model"] if row else given["model"],
        temperature=0,
        max_tokens=max_tokens,
        **named,
    )


if "rows" not in given:
    model = chat_model()
    content = given["messages"][0]["content"]
    answer = model.invoke(content)
    told["chat"], told["usage"] = answer.content, answer.usage_metadata["output_tokens"]
    told["chat_stream"] = "".join(chunk.content for chunk in model.stream(content))
    one = {"tool_choice": "any", "parallel_tool_calls": False}
    model = chat_model(max_tokens=64)
    calling = model.bind_tools([get_weather], **one)
    asking = [HumanMessage(content)]
    call = calling.invoke(asking)
    told["calls"] = called(call)
    first, *rest = calling.stream(asking)
    told["calls_stream"] = called(sum(rest, first))
    results = [get_weather.invoke(one_call) for one_call in call.tool_calls]
    told["results"] = [type(result) is ToolMessage and result.content for result in results]
    told["after"] = model.invoke([*asking, call, *results]).content
    for method in ("function_calling", "json_schema"):
        trip = model.with_structured_output(Trip, method=method).invoke(content)
        told[method] = trip.model_dump()
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
