"""GET /metrics: all figures in Prometheus' format, under the names that vLLM gives them.

Names under ``jaxllm:`` have no counterpart there. What vLLM exports and we cannot say truthfully is
left out. Figures are kept where they arise; they get names, and become text, when somebody asks.
"""

from collections import Counter
from collections.abc import Iterator

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.requests import Request
from starlette.responses import Response

from jaxllm.frontend.histogram import Histogram
from jaxllm.frontend.metrics import EngineMetrics
from jaxllm.messages import CacheInfo, EngineStats
from server.record import RequestRecord
from server.serving import Serving

LABELS = ("model_name", "engine")
ENGINE = "0"  # there is one


class ServerMetrics(Collector):
    """Knows every name. One per application, with a registry of its own.

    Called with the record of each request that has ended.
    """

    def __init__(self, serving: Serving):
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self._serving = serving
        self._labels = (next(iter(serving.settings.served_model_names), ""), ENGINE)
        self._http: Counter[tuple[str, str, str]] = Counter()  # method, route, status

    def __call__(self, record: RequestRecord) -> None:
        self._http[record.method, record.route, str(record.status)] += 1

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand: the engine may not have been started yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield from self._of_server()
        yield from self._of_requests(self._serving.client.metrics)
        cache = self._serving.client.info.cache
        if cache is not None:
            yield self._of_cache(cache)
        stats = self._serving.client.stats()
        if stats is not None:
            yield from self._of_engine(stats)

    def _of_server(self) -> Iterator[Metric]:
        yield self._by(
            "vllm:admission_rejections",
            "Requests refused because the queue was full, by the limit met.",
            "reason",
            self._serving.gate.rejections,
        )
        http = CounterMetricFamily(
            "jaxllm:http_requests",
            "HTTP requests that have ended.",
            labels=("method", "route", "status"),
        )
        for labels, count in self._http.items():
            http.add_metric(labels, count)
        yield http
        refused = CounterMetricFamily(
            "jaxllm:http_connections_refused",
            "Connections ended below HTTP, by the rule they broke.",
            labels=("reason",),
        )
        for reason, count in self._serving.refusals.counts.items():
            refused.add_metric((reason,), count)
        yield refused

    def _of_requests(self, m: EngineMetrics) -> Iterator[Metric]:
        yield self._counter("vllm:prompt_tokens", "Prompt tokens processed.", m.num_prompt_tokens)
        yield self._counter(
            "vllm:prompt_tokens_cached", "Those found in the prefix cache.", m.num_cached_tokens
        )
        yield self._counter("vllm:generation_tokens", "Tokens generated.", m.num_generation_tokens)
        yield self._by(
            "vllm:request_success",
            "Requests that have ended.",
            "finished_reason",
            m.finished,
        )
        yield self._counter(
            "jaxllm:engine_deaths",
            "Engine processes that ended by themselves, were killed or hung.",
            m.num_engine_deaths,
        )
        for name, help, histogram in (
            ("time_to_first_token_seconds", "Since the arrival.", m.time_to_first_token),
            ("inter_token_latency_seconds", "Between two tokens.", m.inter_token_latency),
            (
                "request_time_per_output_token_seconds",
                "Mean time between a request's tokens.",
                m.time_per_output_token,
            ),
            ("e2e_request_latency_seconds", "From arrival to the end.", m.e2e_latency),
            ("request_queue_time_seconds", "Waiting for a place in the batch.", m.queue_time),
            ("request_prefill_time_seconds", "From there to the first token.", m.prefill_time),
            ("request_decode_time_seconds", "From the first token to the last.", m.decode_time),
            ("request_inference_time_seconds", "Prefill and decode.", m.inference_time),
            ("iteration_tokens_total", "Tokens fed to the model per step.", m.step_tokens),
            ("request_prompt_tokens", "Tokens of a request's prompt.", m.prompt_tokens),
            ("request_generation_tokens", "Tokens generated for it.", m.generation_tokens),
            (
                "request_max_num_generation_tokens",
                "Tokens of the longest of its n completions.",
                m.max_generation_tokens,
            ),
            ("request_params_n", "Its parameter n.", m.params_n),
            ("request_params_max_tokens", "Its parameter max_tokens.", m.params_max_tokens),
        ):
            yield self._histogram(f"vllm:{name}", help, histogram)

    def _of_cache(self, cache: CacheInfo) -> Metric:
        values = msgspec.structs.asdict(cache)
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache, in labels.", labels=(*LABELS, *values)
        )
        info.add_metric((*self._labels, *map(str, values.values())), 1)
        return info

    def _of_engine(self, stats: EngineStats) -> Iterator[Metric]:
        """About a second old; nothing while the engine is down. Counters begin anew with it."""
        padding = 1 - stats.num_tokens / stats.num_token_slots if stats.num_token_slots else 0.0
        compilations = stats.compilations
        for name, help, value in (
            ("vllm:num_requests_running", "Requests in the batch.", stats.num_running),
            ("vllm:num_requests_waiting", "Requests that wait for a place.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "KV-cache blocks in use, 0 to 1.", stats.kv_cache_usage),
            ("jaxllm:kv_blocks_on_file", "KV-cache blocks in files.", stats.num_blocks_on_file),
            (
                "jaxllm:bucket_padding_ratio",
                "Share of padding in what programs have computed, 0 to 1.",
                max(padding, 0.0),
            ),
        ):
            gauge = GaugeMetricFamily(name, help, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, help, value in (
            ("vllm:num_preemptions", "Requests sent back to the queue.", stats.num_preemptions),
            (
                "vllm:prefix_cache_queries",
                "Tokens of admitted requests, looked up in the prefix cache.",
                stats.num_prefix_queries,
            ),
            (
                "vllm:prefix_cache_hits",
                "Those found there, and not computed again.",
                stats.num_prefix_hits,
            ),
            (
                "jaxllm:kv_blocks_saved",
                "KV-cache blocks saved to the host's memory.",
                stats.num_blocks_saved,
            ),
            (
                "jaxllm:kv_blocks_loaded",
                "KV-cache blocks loaded from there.",
                stats.num_blocks_loaded,
            ),
            (
                "jaxllm:kv_blocks_read",
                "KV-cache blocks read from files.",
                stats.num_blocks_read,
            ),
            (
                "vllm:corrupted_requests",
                "Requests ended since no token could be drawn: NaN, or all forbidden.",
                stats.num_corrupted,
            ),
            (
                "jaxllm:bucket_tokens",
                "Tokens that programs have computed, padding included.",
                stats.num_token_slots,
            ),
            ("jaxllm:xla_compilations", "Programs compiled by XLA.", compilations.num_compiled),
            (
                "jaxllm:executable_cache_hits",
                "Programs found in the compilation cache.",
                compilations.num_cache_hits,
            ),
            (
                "jaxllm:executable_cache_misses",
                "Programs compiled and added to it.",
                compilations.num_cache_misses,
            ),
        ):
            yield self._counter(name, help, value)

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _by(self, name: str, help: str, label: str, counts: Counter[str]) -> Metric:
        family = CounterMetricFamily(name, help, labels=(*LABELS, label))
        for value, count in counts.items():
            family.add_metric((*self._labels, value), count)
        return family

    def _histogram(self, name: str, help: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, help, labels=LABELS)
        buckets = [(floatToGoString(bound), count) for bound, count in histogram.cumulative()]
        family.add_metric(self._labels, buckets, histogram.sum)
        return family


async def metrics(request: Request) -> Response:
    """In OpenMetrics' format for those who accept it."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    server_metrics: ServerMetrics = request.app.state.metrics
    return Response(encode(server_metrics.registry), headers={"content-type": content_type})
