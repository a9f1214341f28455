"""Random bad requests, the same for the same seed, and what every answer must be.

Three kinds: bodies made by changing good ones, heads and framing made by changing good requests,
and noise.
"""

import http.client
import json
import random
import select
import socket
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from server.errors import ClientGoneError
from server.openai import answers
from tests.server import attacks
from tests.server.attacked_server import error_of
from tests.server.sse import read_stream
from tests.server.wire import connect, request

WAIT_S = 0.05
EXPECTED = {200, 400, 401, 403, 404, 405, 408, 413, 415, 417, 431}
SEEDS: dict[str, tuple[dict[str, Any], ...]] = {
    attacks.CHAT: (
        attacks.chat(max_tokens=3),
        attacks.chat(stream=True, logprobs=True, top_logprobs=3, stop=["a", "b"], seed=3),
        attacks.chat(
            tools=[{"type": "function", "function": {"name": "f"}}],
            tool_choice="auto",
            chat_template_kwargs={"x": 1},
            metadata={"a": "b"},
            response_format={"type": "text"},
        ),
        attacks.chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    ),
    attacks.COMPLETIONS: (
        attacks.completion(),
        attacks.completion(prompt=[[65], [66]], n=2, echo=True, logprobs=2, stream=True),
        attacks.completion(logit_bias={"65": 1}, allowed_token_ids=[65], stop_token_ids=[66]),
        attacks.completion(min_tokens=2, bad_words=["x"], stream_options={"include_usage": True}),
    ),
    attacks.RESPONSES: (
        {"model": "fake", "input": "Hi", "max_output_tokens": 16},
        {
            "model": "fake",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            "instructions": "Be brief.",
            "stream": True,
        },
    ),
    attacks.EMBEDDINGS: ({"model": "fake", "input": ["a", "b"], "encoding_format": "base64"},),
    attacks.TOKENIZE: (
        {"model": "fake", "prompt": "Hi", "add_special_tokens": True},
        {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]},
    ),
    "/detokenize": ({"model": "fake", "tokens": [65, 66]},),
}
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 1e-320, 2**31, 2**53 + 1, 2**63, -(2**63),
    10**40, "", "\0", "a\0b", "\ud800", "\udfff\ud800", "\U0001f600", "\u202e", "é" * 50,
    "x" * 5000, "NaN", [], [[]], {}, [None], {"": None}, [0] * 300, {"a": {"b": [{"c": 1}]}},
    "data:,", "<|im_end|>",
)  # fmt: skip
ANSWERS: dict[str, type[BaseModel]] = {
    attacks.CHAT: answers.ChatCompletion,
    attacks.COMPLETIONS: answers.Completion,
    attacks.RESPONSES: answers.ResponseObject,
    attacks.EMBEDDINGS: answers.EmbeddingList,
    attacks.TOKENIZE: answers.Tokens,
    "/detokenize": answers.Text,
}


@dataclass
class Tally:
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # each with the request to repeat

    @property
    def total(self) -> int:
        return self.statuses.total()


class Mutator:
    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def body(self) -> tuple[str, bytes]:
        path = self.random.choice(list(SEEDS))
        value = deepcopy(self.random.choice(SEEDS[path]))
        for _ in range(self.random.choice((0, 1, 1, 1, 2, 3, 6))):
            self._change(value)
        content = json.dumps(value).encode()
        if self.random.random() < 0.15:
            content = self.damaged(content)
        return path, content

    def damaged(self, data: bytes) -> bytes:
        """One or a few bytes lost, added, doubled or flipped."""
        changed = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 5))):
            at = self.random.randrange(len(changed) + 1)
            until = at + self.random.choice((0, 1, 1, 4, 40))
            noise = self.random.randbytes(self.random.choice((0, 1, 1, 3)))
            piece = self.random.choice((b"", b"\0", b"\r\n", b"\n", b'"', b"\xff", noise))
            doubled = bytes(changed[at:until]) if self.random.random() < 0.2 else b""
            changed[at:until] = piece + doubled * 2
        return bytes(changed)

    def raw(self) -> bytes:
        """What goes over a connection: almost a request, or nothing like one."""
        kind = self.random.random()
        if kind < 0.1:
            return self.random.randbytes(self.random.randrange(1, 400))
        path, content = self.body()
        fields = ["Content-Type: application/json"]
        if kind < 0.4:
            fields.append("Transfer-Encoding: chunked")
            half = self.random.randrange(len(content) + 1)
            parts = [part for part in (content[:half], content[half:]) if part]
            content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
            content += b"0\r\n\r\n"
        method = self.random.choice(("POST", "POST", "POST", "GET", "PUT", "HEAD"))
        data = request(path, *fields, method=method, body=content)
        return self.damaged(data) if self.random.random() < 0.7 else data

    def _change(self, root: dict[str, Any]) -> None:
        """Somewhere in it, one value."""
        container, key = self._somewhere(root)
        how = self.random.random()
        if how < 0.6:
            container[key] = self._value(container[key])
        elif how < 0.75:
            del container[key]
        elif isinstance(container, dict):
            names = (*attacks.EDGES, "best_of", "suffix", "cache_salt", "user", "\0", "", "x" * 300)
            name = self.random.choice(names)
            edge = self.random.choice(attacks.EDGES.get(name, ODD))
            container[name] = deepcopy(edge) if self.random.random() < 0.6 else self._value(edge)
        else:
            container.insert(self.random.randrange(len(container) + 1), self._value(None))

    def _somewhere(self, root: dict[str, Any]) -> tuple[Any, Any]:
        container: Any = root
        while True:
            if not container:
                return root, root.setdefault("model", "fake") and "model"
            keys = list(container) if isinstance(container, dict) else range(len(container))
            key = self.random.choice(keys)
            if not isinstance(container[key], dict | list) or self.random.random() < 0.3:
                return container, key
            if not container[key]:
                return container, key
            container = container[key]

    def _value(self, old: Any) -> Any:
        how = self.random.random()
        if isinstance(old, int | float) and not isinstance(old, bool) and how < 0.3:
            return old * self.random.choice((-1, 2, 10**6, 0.5))
        if isinstance(old, str) and how < 0.3:
            return "".join(chr(self.random.randrange(0x3000)) for _ in range(9)) + old
        if how < 0.4:
            return self.random.randrange(-3, attacks.VOCAB_SIZE + 3)
        value = deepcopy(self.random.choice(ODD))
        return [value, old] if how > 0.95 else value


def send_bodies(url: str, seed: int, count: int) -> Tally:
    mutator, tally = Mutator(seed), Tally()
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=url, timeout=30) as http:
        for _ in range(count):
            path, content = mutator.body()
            try:
                answer = http.post(path, content=content, headers=headers)
                tally.statuses[answer.status_code] += 1
                check_answer(path, answer)
            except (AssertionError, ValidationError, ValueError, httpx.HTTPError) as error:
                tally.failures.append(f"{path} {content!r}: {error!r}"[:2000])
    return tally


def check_answer(path: str, answer: httpx.Response) -> None:
    assert answer.status_code in EXPECTED, f"{answer.status_code} {answer.text[:500]}"
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.status_code == 200
        stream = read_stream(answer.content)
        assert stream.error is None, stream.error
    elif answer.status_code == 200:
        ANSWERS[path].model_validate_json(answer.content)
    else:
        assert error_of(answer)["type"] == "invalid_request_error"


def send_raw(port: int, seed: int, count: int) -> Tally:
    mutator, tally = Mutator(seed), Tally()
    for _ in range(count):
        data = mutator.raw()
        try:
            status = say_raw(port, data)
            tally.statuses[status] += 1
            assert status in EXPECTED | {0, ClientGoneError.status}, status
        except (AssertionError, ValueError, OSError, http.client.HTTPException) as error:
            tally.failures.append(f"{data!r}: {error!r}"[:2000])
    return tally


def say_raw(port: int, data: bytes) -> int:
    """Status of the first answer; 0 if the connection was closed without one. Who is not answered
    at once says that nothing more comes.
    """
    with connect(port) as connection:
        try:
            connection.sendall(data)
            if not select.select([connection], [], [], WAIT_S)[0]:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            return 0
        method = "HEAD" if data.startswith(b"HEAD ") else "GET"
        response = http.client.HTTPResponse(connection, method=method)
        try:
            response.begin()
            body = response.read()
        except (http.client.RemoteDisconnected, ConnectionResetError):
            return 0
    if response.status != 200 and body:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    return response.status
