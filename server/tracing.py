"""Traces: one OpenTelemetry span per request, sent to the operator's collector.

The SDK is an optional extra. Spans are made when requests have ended, from their records; they
hold token counts, parameters and times, and nothing that was said.
"""

import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import jaxllm
from jaxllm.errors import ConfigError
from jaxllm.outputs import RequestMetrics
from server.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

EXPORT_TIMEOUT_S = 5.0  # also what a collector that does not answer costs at the end
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
}


class Tracer:
    """Called with the record of each request that has ended; POST only, since all others are
    looks at the server. A caller's ``traceparent`` becomes the span's parent, and a caller that
    does not sample is not traced.
    """

    def __init__(self, exporter: "SpanExporter"):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say wins.
        ours = Resource({"service.name": "jaxllm", "service.version": jaxllm.__version__})
        self._provider = TracerProvider(resource=ours.merge(Resource.create()))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxllm", jaxllm.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: RequestRecord) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        if record.method != "POST":
            return
        carrier = {"traceparent": record.traceparent, "tracestate": record.tracestate}
        span = self._tracer.start_span(
            _name(record),
            context=self._propagator.extract({k: v for k, v in carrier.items() if v}),
            kind=SpanKind.SERVER,
            attributes=attributes(record),
            start_time=record.started_ns,
        )
        if span.is_recording():
            for metrics in record.metrics:
                for name, seconds in _events(record, metrics):
                    span.add_event(name, timestamp=record.started_ns + int(seconds * 1e9))
            if record.status >= 500 or record.error is not None:
                span.set_status(Status(StatusCode.ERROR))
        span.end(record.started_ns + int(record.seconds * 1e9))

    def close(self) -> None:
        """Send what is left; waits for the collector, but not for long."""
        self._provider.shutdown()


def open_tracer(endpoint: str) -> Tracer:
    """Spans go to ``endpoint`` as OTLP over HTTP; one without a path gets the usual /v1/traces.

    Raises:
        ConfigError: it is no HTTP URL, or the SDK is not installed.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "--otlp-traces-endpoint must be a URL such as http://localhost:4318/v1/traces, got "
            f"{endpoint!r}."
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs a package that is not installed ({error.name}). "
            "Install jaxllm[otel]."
        ) from error
    path = parts.path if parts.path not in ("", "/") else "/v1/traces"
    url = parts._replace(path=path).geturl()
    return Tracer(OTLPSpanExporter(url, timeout=EXPORT_TIMEOUT_S))


def attributes(record: RequestRecord) -> dict[str, Any]:
    """Under the names of OpenTelemetry's conventions for generative AI, and vLLM's for times."""
    params = record.params
    found: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.error,
        "gen_ai.operation.name": _OPERATIONS.get(record.route),
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.model": None if record.model is None else record.model[:128],
        "gen_ai.latency.e2e": record.seconds,
        "gen_ai.latency.time_in_queue": record.longest("queue_time"),
        "gen_ai.latency.time_to_first_token": record.longest("first_token_latency"),
        "gen_ai.latency.time_in_model_prefill": record.longest("prefill_time"),
        "gen_ai.latency.time_in_model_decode": record.longest("decode_time"),
        "gen_ai.latency.time_in_model_inference": record.longest("inference_time"),
    }
    if params is not None:
        found |= {
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.choice.count": params.n,
        }
    if record.prompts:
        found |= {
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_output_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
            "gen_ai.response.finish_reasons": record.finish_reasons,
        }
    return {name: value for name, value in found.items() if value is not None}


def _name(record: RequestRecord) -> str:
    """Of few different ones: the model's name is an attribute, since clients can make it up."""
    return _OPERATIONS.get(record.route, f"{record.method} {record.route}")


def _events(record: RequestRecord, metrics: RequestMetrics) -> list[tuple[str, float]]:
    """(name, seconds since the request came), from the first token backwards and forwards: only
    differences can be taken over from the engine's clock.
    """
    if metrics.first_token_latency is None:
        return []
    first = metrics.arrival_time + metrics.first_token_latency - record.started
    scheduled = first - (metrics.prefill_time or 0.0)
    return [
        ("queued", scheduled - (metrics.queue_time or 0.0)),
        ("scheduled", scheduled),
        ("first_token", first),
        ("last_token", first + (metrics.decode_time or 0.0)),
    ]
