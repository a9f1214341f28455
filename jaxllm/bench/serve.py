"""``jaxllm bench serve``: drives an OpenAI-compatible server and times its streams.

Knows no engine: whatever is measured came over HTTP.
"""

import asyncio
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxllm.bench.goodput import Goodput
from jaxllm.bench.http_client import BaseURL, HTTPError, request
from jaxllm.bench.prompt_text import text_of
from jaxllm.bench.report import check_writable, make_client_report, write_report
from jaxllm.bench.request_record import RequestRecord, record_request
from jaxllm.bench.serve_summary import print_summary, summarize
from jaxllm.bench.workload import Workload, make_workload
from jaxllm.config import env
from jaxllm.errors import ConfigError, RequestFailedError

ROUTES = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_QUESTION_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBenchOptions:
    """What the command line says. ``None`` means the workload's own, or no limit."""

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None  # None: the first that the server names
    endpoint: str = "completions"
    workload: str = "random"
    num_prompts: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    vocab_size: int = 32_000  # ids are folded into it; common models have at least so many
    request_rate: float = math.inf
    max_concurrency: int | None = None
    seed: int = 0
    ignore_eos: bool = False
    timeout_s: float | None = None  # per request
    goodput: tuple[str, ...] = ()
    json_path: Path | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not self.request_rate > 0:
            raise ConfigError(f"--request-rate must be above 0, got {self.request_rate}.")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency must be at least 1, got {self.max_concurrency}.")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ConfigError(f"--timeout must be above 0, got {self.timeout_s}.")
        if self.vocab_size < 1:
            raise ConfigError(f"--vocab-size must be at least 1, got {self.vocab_size}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must be in [0, 2**32), got {self.seed}.")


def run_serve(options: ServeBenchOptions) -> dict[str, Any]:
    """Run it, print the figures, return (and write) the report.

    Raises:
        ConfigError: the arguments are wrong, or the server is not there.
        RequestFailedError: not one request succeeded.
    """
    check_writable(options.json_path)
    base = BaseURL.parse(options.base_url)
    goodput = Goodput.parse(list(options.goodput)) if options.goodput else None
    work = make_workload(
        options.workload,
        options.num_prompts,
        options.input_len,
        options.output_len,
        seed=options.seed if options.workload == "random" else None,
    )
    model, records, seconds = asyncio.run(_run(options, base, work))
    figures = {
        "benchmark": "serve",
        "base_url": str(base),
        "model": model,
        "endpoint": options.endpoint,
        **work.describe(),
        "ids_folded_to_vocabulary": work.folded(options.vocab_size).folded_to,
        "request_rate": None if math.isinf(options.request_rate) else options.request_rate,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
        "ignore_eos": options.ignore_eos,
        **summarize(records, seconds, goodput),
    }
    report = make_client_report(figures)
    print_summary(report)
    write_report(report, options.json_path)
    if not report["completed"]:
        raise RequestFailedError(f"All {len(records)} requests failed.")
    return report


async def _run(
    options: ServeBenchOptions, base: BaseURL, work: Workload
) -> tuple[str, list[RequestRecord], float]:
    """The model's name, the records in the workload's order, and the seconds it took."""
    headers = request_headers()
    model = options.model or await ask_model(base, headers)
    bodies = make_bodies(options, model, work)
    route = ROUTES[options.endpoint]
    warm_up = await record_request(base, route, bodies[0] | {"max_tokens": 1}, headers)
    if warm_up.failure is not None:
        raise ConfigError(f"The first request to {base}{route} failed: {warm_up.failure}.")
    expected = work.output_lens if options.ignore_eos else [None] * len(bodies)
    places = asyncio.Semaphore(options.max_concurrency or len(bodies))

    async def one(index: int) -> RequestRecord:
        async with places:
            record = await record_request(
                base,
                route,
                bodies[index],
                headers,
                expected_tokens=expected[index],
                timeout_s=options.timeout_s,
            )
        bar.update()
        return record

    delays = arrival_delays(len(bodies), options.request_rate, options.seed)
    with tqdm(total=len(bodies), desc="Requests", unit="req") as bar:
        started = time.perf_counter()
        tasks: list[asyncio.Task[RequestRecord]] = []
        for index, due in enumerate(delays):
            wait = started + due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(index)))
        records = await asyncio.gather(*tasks)
        return model, records, time.perf_counter() - started


def arrival_delays(n: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which requests are sent: a Poisson process, the first at 0."""
    if math.isinf(rate):
        return [0.0] * n
    gaps = np.random.RandomState(seed).exponential(1 / rate, size=n - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def make_bodies(options: ServeBenchOptions, model: str, work: Workload) -> list[dict[str, Any]]:
    """One greedy, streamed request per prompt: token ids, or as many words in a chat message."""
    common: dict[str, Any] = {
        "model": model,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        common["ignore_eos"] = True
    bodies: list[dict[str, Any]] = []
    folded = work.folded(options.vocab_size)
    for ids, length in zip(folded.prompts, folded.output_lens, strict=True):
        if options.endpoint == "chat":
            prompt = {"messages": [{"role": "user", "content": text_of(ids)}]}
        else:
            prompt = {"prompt": ids}
        bodies.append({**common, **prompt, "max_tokens": length})
    return bodies


def request_headers() -> dict[str, str]:
    """The key comes from the environment, never from the command line, which reports hold."""
    keys = env.api_keys()
    key = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    return {"Content-Type": "application/json", **key}


async def ask_model(base: BaseURL, headers: dict[str, str]) -> str:
    """The first model that the server names. Raises ConfigError."""
    try:
        async with (
            asyncio.timeout(_QUESTION_SECONDS),
            request(base, "GET", "/v1/models", headers=headers) as response,
        ):
            body = await response.read()
            if response.status != 200:
                raise ConfigError(f"{base}/v1/models answers with status {response.status}.")
            return str(json.loads(body)["data"][0]["id"])
    except (OSError, HTTPError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer in time"
        raise ConfigError(f"There is no server at {base}: {reason}.") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{base}/v1/models does not answer as OpenAI's API does.") from error
