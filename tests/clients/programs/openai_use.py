# pyright: reportMissingImports=false, reportArgumentType=false, reportOptionalMemberAccess=false
"""A day with openai-python: every endpoint it has, whole and streamed."""

import asyncio
import json
import sys

import openai

given = json.load(sys.stdin)
model, messages = given["model"], given["messages"]
plain = {"model": model, "temperature": 0, "max_tokens": 12}
told = {}

with openai.OpenAI(base_url=given["url"], api_key="none", max_retries=0) as client:
    told["models"] = [client.models.list().data[0].id, client.models.retrieve(model).id]

    whole = client.chat.completions.create(messages=messages, **plain)
    told["chat"] = whole.choices[0].message.content
    told["chat_usage"] = whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
            **plain,
        )
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    told["chat_stream"] = "".join(choice.delta.content or "" for choice in choices)
    told["chat_stream_usage"] = chunks[-1].usage.completion_tokens
    told["chat_logprobs"] = sum(len(c.logprobs.content) for c in choices if c.logprobs)
    with client.chat.completions.stream(messages=messages, **plain) as stream:
        told["chat_accumulated"] = stream.get_final_completion().choices[0].message.content

    scored = client.completions.create(
        prompt="Paris is the capital of", echo=True, logprobs=1, **plain
    )
    told["completion"] = scored.choices[0].text
    told["completion_logprobs"] = len(scored.choices[0].logprobs.tokens)
    pieces = client.completions.create(prompt="Paris is the capital of", stream=True, **plain)
    told["completion_stream"] = "".join(piece.choices[0].text for piece in pieces)

    response = client.responses.create(
        model=model, input=messages, temperature=0, max_output_tokens=16
    )
    told["response"] = response.output_text
    with client.responses.stream(
        model=model, input=messages, temperature=0, max_output_tokens=16
    ) as events:
        told["response_stream"] = events.get_final_response().output_text

    vectors = client.embeddings.create(model=model, input=["one", "two"])
    told["embeddings"] = [len(item.embedding) for item in vectors.data]


async def together() -> list[str]:
    async with openai.AsyncOpenAI(base_url=given["url"], api_key="none") as client:
        asks = [client.chat.completions.create(messages=messages, **plain) for _ in range(4)]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*asks)]


told["async"] = asyncio.run(together())
print(json.dumps(told))
