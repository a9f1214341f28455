"""Traces against the real SDK, and a collector on this machine for what really goes out."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxllm.errors import ConfigError
from server.app import create_app
from server.settings import ServerSettings
from server.tracing import Tracer, open_tracer
from tests.server.fake_client import FakeClient

BODY: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "top secret"}]}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"


class Traced:
    """The application, and its finished spans."""

    def __init__(self, engine: FakeClient):
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        self.exporter = memory.InMemorySpanExporter()
        self.tracer = Tracer(self.exporter)
        settings = ServerSettings(served_model_names=("fake",))
        self.http = TestClient(create_app(engine, settings, self.tracer))

    def spans(self) -> Any:
        self.tracer.close()
        return self.exporter.get_finished_spans()


@pytest.fixture
def traced(engine: FakeClient) -> Traced:
    return Traced(engine)


def test_span_of_a_request(traced: Traced) -> None:
    body = BODY | {"max_tokens": 3, "temperature": 0.5}
    usage = traced.http.post("/v1/chat/completions", json=body).json()["usage"]
    traced.http.get("/health")
    (span,) = traced.spans()
    assert span.name == "chat"
    assert span.parent is None
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.latency.time_in_queue": 0.125,
        "gen_ai.latency.time_in_model_decode": 0.5,
        "http.response.status_code": 200,
    }
    assert {name: span.attributes.get(name) for name in expected} == expected
    assert "secret" not in span.to_json()
    events = {event.name: event.timestamp for event in span.events}
    assert list(events) == ["queued", "scheduled", "first_token", "last_token"]
    assert events["scheduled"] - events["queued"] == pytest.approx(0.125e9, abs=1e3)
    assert events["last_token"] - events["first_token"] == pytest.approx(0.5e9, abs=1e3)
    assert span.end_time > span.start_time


def test_the_callers_trace_goes_on(traced: Traced) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": "a=b"}
    traced.http.post("/v1/chat/completions", json=BODY, headers=headers)
    headers["traceparent"] = headers["traceparent"][:-1] + "0"  # it does not sample
    traced.http.post("/v1/chat/completions", json=BODY, headers=headers)
    (span,) = traced.spans()
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == SPAN_ID


@pytest.mark.parametrize("traceparent", ["", "x", "00-" + "0" * 32 + f"-{SPAN_ID}-01", "\xff" * 99])
def test_bad_trace_headers_begin_a_trace_of_their_own(traced: Traced, traceparent: str) -> None:
    headers = {b"traceparent": traceparent.encode("latin-1")}
    answer = traced.http.post("/v1/chat/completions", json=BODY, headers=headers)
    assert answer.status_code == 200
    (span,) = traced.spans()
    assert span.parent is None


def test_failures_are_errors(traced: Traced, engine: FakeClient) -> None:
    engine.fail_with, engine.fail_at = RuntimeError("0xdeadbeef"), 2
    traced.http.post("/v1/chat/completions", json=BODY | {"stream": True})
    traced.http.post("/v1/chat/completions", json={"model": "fake"})
    failed, refused = traced.spans()
    assert failed.status.status_code.name == "ERROR"
    assert failed.attributes["error.type"] == "internal_error"
    assert refused.status.status_code.name == "UNSET"
    assert refused.attributes["http.response.status_code"] == 400
    assert "deadbeef" not in failed.to_json()


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Its URL, and what was posted to it."""
    posted: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            posted.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", posted
        server.shutdown()
        thread.join()


def test_spans_reach_the_collector(
    collector: tuple[str, list[tuple[str, bytes]]], engine: FakeClient
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    url, posted = collector
    tracer = open_tracer(url)
    http = TestClient(create_app(engine, ServerSettings(served_model_names=("fake",)), tracer))
    http.post("/v1/chat/completions", json=BODY)
    assert posted == []  # nobody's answer waits for it
    tracer.close()
    ((path, body),) = posted
    assert path == "/v1/traces"
    assert b"gen_ai.usage.output_tokens" in body


@pytest.mark.parametrize("endpoint", ["localhost:4317", "file:///etc/passwd", "http://", ""])
def test_bad_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint must be a URL"):
        open_tracer(endpoint)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"Install jaxllm\[otel\]"):
        open_tracer("http://localhost:4318")
