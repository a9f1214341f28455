"""32 streams of the default model at once, each equal to the same request alone."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.clients.conftest import MAX_NUM_SEQS
from tests.server.sse import read_stream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOPICS = ("rain", "Paris", "prime numbers", "a red fox", "bread", "the sea", "music", "winter")


def requests() -> list[dict[str, Any]]:
    """Greedy and seeded, short and long, with and without penalties and logprobs."""
    return [
        {
            "model": "smollm2-135m",
            "prompt": f"{'Once more: ' * (i % 9)}Let me tell you about {TOPICS[i % 8]}. It",
            "max_tokens": 6 + i % 7,
            "temperature": 0 if i % 2 else 0.9,
            "top_p": 0.95,
            "top_k": 40 if i % 3 else -1,
            "seed": i,
            "frequency_penalty": 0.5 if i % 5 == 0 else 0,
            "logprobs": 1 if i % 4 == 0 else None,
            "ignore_eos": True,
            "stream": True,
        }
        for i in range(MAX_NUM_SEQS)
    ]


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    stream = read_stream(response.content)
    assert stream.done
    assert stream.objects[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(chunk["choices"][0]["text"] for chunk in stream.objects)


async def both(url: str) -> tuple[list[str], list[str]]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        together = await asyncio.gather(*(ask(http, body) for body in requests()))
        alone = [await ask(http, body) for body in requests()]
    return together, alone


def test_company_changes_nothing(default_url: str) -> None:
    together, alone = asyncio.run(both(default_url))
    assert together == alone
    assert len(set(alone)) == MAX_NUM_SEQS
