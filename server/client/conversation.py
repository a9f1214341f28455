"""A conversation with an endpoint: what was said, and the next answer as it comes."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from jaxllm.bench.event_stream import EventStreamParser
from jaxllm.bench.http_client import HTTPError
from jaxllm.errors import RequestFailedError
from server.client.endpoint import Answer, Endpoint, read_body

ROUTE = "/v1/chat/completions"


class Conversation:
    """``fields``: of every request, such as the temperature."""

    def __init__(self, endpoint: Endpoint, fields: dict[str, Any], system: str | None = None):
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.thoughts = ""  # of the latest answer
        self._endpoint = endpoint
        self._fields = fields

    def reset(self) -> None:
        self.messages.clear()
        self.thoughts = ""

    async def ask(self, text: str) -> AsyncGenerator[str]:
        """The answer in parts; empty ones while the model thinks. Closing it early aborts the
        answer and keeps what had come; of a question that got no answer at all nothing is kept.

        Raises:
            RequestFailedError: there is no answer, or no more of it; the message says why.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        body = {
            "model": self._endpoint.model,
            "messages": [*system, *self.messages, question],
            "stream": True,
            **self._fields,
        }
        said: list[str] = []
        self.thoughts = ""
        try:
            async with (
                self._endpoint.post(ROUTE, body) as answer,
                aclosing(_deltas(answer)) as deltas,
            ):
                async for text, thoughts in deltas:
                    self.thoughts += thoughts
                    if text:
                        said.append(text)
                    yield text
        except (OSError, HTTPError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RequestFailedError(f"No answer: {reason}.") from error
        finally:
            if said:
                self.messages += [question, {"role": "assistant", "content": "".join(said)}]


async def _deltas(answer: Answer) -> AsyncGenerator[tuple[str, str]]:
    """Text and thoughts."""
    if answer.status != 200:
        raise RequestFailedError(reason_of(await read_body(answer), answer.status))
    parser = EventStreamParser()
    async with aclosing(answer.parts()) as parts:
        async for part in parts:
            for data in parser.feed(part):
                if data == "[DONE]":
                    return
                delta = _delta(data)
                if any(delta):
                    yield delta
    raise HTTPError("it was cut off")


def _delta(data: str) -> tuple[str, str]:
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise RequestFailedError(str(chunk["error"]["message"]))
        deltas = [choice["delta"] for choice in chunk["choices"]]
        thoughts = [d.get("reasoning") or d.get("reasoning_content") or "" for d in deltas]
        return "".join(d.get("content") or "" for d in deltas), "".join(thoughts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HTTPError("it is not as OpenAI's API has it") from error


def reason_of(body: bytes, status: int) -> str:
    """The message of an error's body, or its status."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered with status {status}."
