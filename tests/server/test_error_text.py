"""What errors say: nothing about this process, whatever went wrong; and no line of the log more
than one request is worth.
"""

import json
import logging
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.openai.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient
from tests.server.wire import request, running, say

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LEAK = re.compile(r'0x[0-9a-f]{6,}|/site-packages/|Traceback|File "|pydantic|/work/|/home/|\.py\b')
MESSAGES = [{"role": "user", "content": "Hi"}]

Serve = Callable[..., TestClient]


class Odd:
    """Something whose text is an address."""


FAILURES: list[Exception] = [
    ZeroDivisionError(f"at {Odd()!r}"),
    KeyError(Odd()),
    TypeError('File "/work/x.py", line 3'),
    OSError(2, "No such file", "/home/user/.cache/secret.py"),
    MemoryError(),
    RecursionError("maximum recursion depth exceeded"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    ExceptionGroup("several", [ValueError("0xdeadbeef")]),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_unforeseen_errors(
    http: TestClient, engine: FakeClient, failure: Exception, stream: bool
) -> None:
    for fail_at in (0, 2):
        engine.fail_with, engine.fail_at = failure, fail_at
        body = {"model": "fake", "messages": MESSAGES, "stream": stream}
        response = http.post(CHAT, json=body, headers={"x-request-id": "the-id"})
        assert not LEAK.search(response.text), response.text
        assert "the-id" in response.text
        assert '"code":"internal_error"' in response.text


BAD_FIELDS: list[Any] = [
    {"$ref": "#"}, [[[]]], "\u0000", "\U0001f600" * 50, -1e308, 2**63, True, {"__class__": "x"},
    "{{ self.__init__.__globals__ }}", "../../etc/passwd", "<built-in method>", [{}],
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "base", "schema"),
    [
        (CHAT, {"messages": MESSAGES}, ChatCompletionRequest),
        (COMPLETIONS, {"prompt": "Hi"}, CompletionRequest),
    ],
)
def test_refusals_of_every_field(
    http: TestClient, path: str, base: dict[str, Any], schema: type[GenerationRequest]
) -> None:
    with http:  # one event loop for all
        for name, value in product((*schema.model_fields, *schema.REFUSED), BAD_FIELDS):
            body = {"model": "fake", "max_tokens": 2} | base | {name: value}
            response = http.post(path, json=body)
            assert response.status_code in (200, 400, 404), (name, value)
            assert response.status_code == 200 or not LEAK.search(response.text)


def test_refusals_below_the_application(engine: FakeClient) -> None:
    settings = ServerSettings(served_model_names=("fake",), allowed_hosts=("x",))
    with running(create_app(engine, settings)) as port:
        for data in (
            b"noise\r\n\r\n",
            b"GET /%s HTTP/1.1\r\n\r\n" % b"/work/x.py",
            request(host="0xdeadbeef:1:2"),
            request("/" + "a" * 40000),
            request("/", "Content-Length: 99999999", method="POST"),
            request(host="attacker.example"),
            request("/v1/models", "X-Request-Timeout-Ms: 0xdeadbeef"),
        ):
            answer = say(port, data)
            assert answer.status >= 400
            assert answer.error["message"]
            assert not LEAK.search(answer.body.decode())


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "text/event-stream", "a/b"])
def test_other_kinds_of_body(http: TestClient, kind: str) -> None:
    response = http.post(CHAT, content=b"--x\r\n\r\n--x--", headers={"content-type": kind})
    assert response.status_code == 415


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "deflate", "gzip, identity", "x"])
def test_bodies_are_never_unpacked(http: TestClient, coding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": coding}
    assert http.post(CHAT, content=b"\x1f\x8b" * 99, headers=headers).status_code == 415


def test_ranges_mean_nothing(http: TestClient) -> None:
    whole = http.get("/v1/models")
    part = http.get("/v1/models", headers={"range": "bytes=0-0," * 1000 + "1-1"})
    assert (part.status_code, part.content) == (200, whole.content)


def test_nothing_breaks_a_line_of_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    odd = "a\r\n2026-01-01 CRITICAL forged\x1b[2J\u2028"
    http = serve()
    body = {"model": odd, "messages": MESSAGES, "user": odd, odd: 1}
    http.post(CHAT, json=body)
    http.post(CHAT, json=body | {"model": "fake", "max_tokens": 1})
    http.get(f"/v1/models/{'%0d%0aforged'}", headers={"user-agent": "x\x1b[2J"})
    for record in caplog.records:
        assert not re.search(r"[\r\n\x1b\u2028]", record.getMessage()), record
    for line in capfd.readouterr().out.splitlines():
        assert not line.startswith("2026-01-01 CRITICAL")
        assert json.loads(line) if line.startswith("{") else line
