import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import structs
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from jaxllm.messages import CacheInfo, Compilations, EngineStats
from server.app import create_app
from server.middleware.record import METHODS, RecordMiddleware
from server.routes import ROUTES
from server.settings import ServerSettings
from tests.server.fake_client import FakeClient

DASHBOARD = Path(__file__).parents[2] / "configs/grafana/jaxllm.json"
BODY = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    kv_cache_usage=0.25,
    num_preemptions=7,
    num_steps=11,
    num_corrupted=1,
    num_tokens=75,
    num_token_slots=100,
    compilations=Compilations(num_compiled=5, num_cache_hits=4, num_cache_misses=6),
)


def scrape(http: TestClient) -> dict[str, float]:
    """Samples by name and those labels that are not always the same."""
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("vllm:"):
                assert (labels.pop("model_name"), labels.pop("engine")) == ("fake", "0")
            for name in ("model_name", "engine"):
                labels.pop(name, None)
            text = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            name = f"{sample.name}{{{text}}}" if text else sample.name
            assert name not in found
            found[name] = sample.value
    return found


def test_figures_right_after_known_requests(http: TestClient, engine: FakeClient) -> None:
    """The fake's tokens take a quarter second each, half of the first one in the queue."""
    engine.engine_stats = STATS
    before = scrape(http)
    assert before["vllm:generation_tokens_total"] == 0
    prompts = 0
    for max_tokens in (4, 1):
        answer = http.post("/v1/chat/completions", json=BODY | {"max_tokens": max_tokens}).json()
        prompts += answer["usage"]["prompt_tokens"]
    http.post("/v1/completions", json={"model": "fake", "prompt": "ab", "n": 2, "max_tokens": 3})
    now = scrape(http)
    expected = {
        "vllm:prompt_tokens_total": prompts + 2 * 2,
        "vllm:prompt_tokens_cached_total": 0,
        "vllm:generation_tokens_total": 4 + 1 + 2 * 3,
        "vllm:request_success_total{finished_reason=length}": 4,
        "vllm:request_success_total{finished_reason=stop}": 0,
        "vllm:time_to_first_token_seconds_count": 4,
        "vllm:time_to_first_token_seconds_sum": 4 * 0.25,
        "vllm:time_to_first_token_seconds_bucket{le=0.1}": 0,
        "vllm:time_to_first_token_seconds_bucket{le=0.25}": 4,
        "vllm:inter_token_latency_seconds_count": 3 + 2 * 2,
        "vllm:inter_token_latency_seconds_sum": 7 * 0.25,
        "vllm:request_time_per_output_token_seconds_count": 3,
        "vllm:request_time_per_output_token_seconds_sum": 3 * 0.25,
        "vllm:request_queue_time_seconds_sum": 4 * 0.125,
        "vllm:request_prefill_time_seconds_sum": 4 * 0.125,
        "vllm:request_decode_time_seconds_sum": 0.75 + 2 * 0.5,
        "vllm:request_inference_time_seconds_sum": 4 * 0.125 + 1.75,
        "vllm:e2e_request_latency_seconds_sum": 1.0 + 0.25 + 2 * 0.75,
        "vllm:request_generation_tokens_bucket{le=1.0}": 1,
        "vllm:request_generation_tokens_bucket{le=5.0}": 4,
        "vllm:request_max_num_generation_tokens_count": 3,
        "vllm:request_params_n_bucket{le=1.0}": 2,
        "vllm:request_params_n_bucket{le=2.0}": 3,
        "vllm:request_params_max_tokens_sum": 4 + 1 + 2 * 3,
        "vllm:request_prompt_tokens_sum": prompts + 2 * 2,
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:num_preemptions_total": 7,
        "vllm:corrupted_requests_total": 1,
        "jaxllm:bucket_padding_ratio": 0.25,
        "jaxllm:bucket_tokens_total": 100,
        "jaxllm:xla_compilations_total": 5,
        "jaxllm:executable_cache_hits_total": 4,
        "jaxllm:executable_cache_misses_total": 6,
        "jaxllm:http_requests_total{method=POST,route=/v1/chat/completions,status=200}": 2,
    }
    assert {name: now.get(name) for name in expected} == expected
    assert now["process_resident_memory_bytes"] > 1e6


def test_the_cache_is_told_in_labels(http: TestClient, engine: FakeClient) -> None:
    assert not any("cache_config" in name for name in scrape(http))
    engine.info = structs.replace(engine.info, cache=CacheInfo(16, "auto", 64, 0, True, 0.92))
    labels = (
        "block_size=16,cache_dtype=auto,enable_prefix_caching=True,gpu_memory_utilization=0.92,"
        "num_cpu_blocks=0,num_gpu_blocks=64"
    )
    assert scrape(http)[f"vllm:cache_config_info{{{labels}}}"] == 1


def test_requests_that_fail_are_not_successes(http: TestClient, engine: FakeClient) -> None:
    engine.fail_with = RuntimeError("no")
    engine.fail_at = 1
    assert http.post("/v1/chat/completions", json=BODY).status_code == 500
    now = scrape(http)
    route = "route=/v1/chat/completions,status=500"
    assert now[f"jaxllm:http_requests_total{{method=POST,{route}}}"] == 1
    assert now["vllm:request_success_total{finished_reason=abort}"] == 1
    assert now["vllm:e2e_request_latency_seconds_count"] == 0


def test_rejections_are_counted_by_the_limit_they_met(
    serve: Callable[..., TestClient], engine: FakeClient
) -> None:
    http = serve(max_num_seqs=1, max_num_queued_reqs=0)
    gate = http.app.state.serving.gate  # type: ignore[attr-defined]
    with gate.admit(1, 1):
        assert http.post("/v1/chat/completions", json=BODY).status_code == 429
    now = scrape(http)
    assert now["vllm:admission_rejections_total{reason=max_num_queued_reqs}"] == 1
    assert now["vllm:admission_rejections_total{reason=max_num_queued_tokens}"] == 0


def test_refused_connections_are_counted(http: TestClient) -> None:
    http.app.state.serving.refusals.note("slow_reader")  # type: ignore[attr-defined]
    assert scrape(http)["jaxllm:http_connections_refused_total{reason=slow_reader}"] == 1


def test_engine_that_is_down_has_no_figures(http: TestClient) -> None:
    now = scrape(http)
    assert "vllm:num_requests_running" not in now
    assert "vllm:generation_tokens_total" in now


def test_applications_do_not_share_figures(serve: Callable[..., TestClient]) -> None:
    one, other = serve(), serve()
    one.get("/health")
    names = [name for name in scrape(other) if name.startswith("jaxllm:http_requests")]
    assert names == []


def test_needs_a_key_unless_told(serve: Callable[..., TestClient]) -> None:
    assert serve(api_keys=("k",)).get("/metrics").status_code == 401
    assert serve(api_keys=("k",), metrics_no_auth=True).get("/metrics").status_code == 200


def test_openmetrics_for_those_who_ask(http: TestClient, engine: FakeClient) -> None:
    engine.engine_stats = STATS
    http.post("/v1/chat/completions", json=BODY)
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = http.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert {family.name for family in parse_open(response.text)} >= {"vllm:generation_tokens"}


async def _ask(app: Any, method: str, path: str) -> None:
    scope = {
        "type": "http",
        "state": {"request_id": "r"},
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"testserver")],
        "server": ("testserver", 80),
        "scheme": "http",
        "http_version": "1.1",
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    await app(scope, receive, send)


def test_nobody_can_invent_labels(engine: FakeClient) -> None:
    """Odd methods, paths and models leave as many series as there are kinds of them."""
    app = create_app(engine, ServerSettings(served_model_names=("fake",)))
    http = TestClient(app)

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})

    short_cut = RecordMiddleware(nothing, routes=ROUTES, watchers=[app.state.metrics])

    async def ask_many(target: Any, start: int, count: int) -> None:
        for i in range(start, start + count):
            await _ask(target, f"M{i}", f"/p{i}")
            await _ask(target, "GET", f"/v1/models/m{i}")
            await _ask(target, "POST" if i % 2 else f"X{i}", f"/v1/completions/{i}")

    asyncio.run(ask_many(app, 0, 100))
    scrape(http)
    first = http.get("/metrics").text
    asyncio.run(ask_many(app, 100, 300))
    asyncio.run(ask_many(short_cut, 400, 33_000))
    later = http.get("/metrics").text
    assert abs(len(later) - len(first)) < 200  # the figures have more digits
    assert later.count("\n") == first.count("\n")
    families = {family.name: family for family in text_string_to_metric_families(later)}
    labels = [sample.labels for sample in families["jaxllm:http_requests"].samples]
    assert {label["method"] for label in labels} <= METHODS | {"other"}
    assert {label["route"] for label in labels} <= {route.path for route in ROUTES} | {"other"}


def test_dashboard_shows_what_there_is(http: TestClient, engine: FakeClient) -> None:
    engine.engine_stats = STATS
    http.post("/v1/chat/completions", json=BODY)
    http.app.state.serving.refusals.note("slow_reader")  # type: ignore[attr-defined]
    scrape(http)
    exported = {name.partition("{")[0] for name in scrape(http)}
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    used = {name for t in targets for name in re.findall(r"(?:vllm|jaxllm):\w+", t["expr"])}
    assert len(dashboard["panels"]) >= 10
    assert all(panel["targets"] for panel in dashboard["panels"])
    assert len(used) >= 15
    assert used <= exported
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
