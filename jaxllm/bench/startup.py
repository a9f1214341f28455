"""``jaxllm bench startup``: how long from nothing to the first token, programs compiled or loaded.

The model must be on this machine already: fetching it is not part of what is measured.
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from jaxllm.bench.http_client import BaseURL
from jaxllm.bench.report import check_writable, make_client_report, write_report
from jaxllm.bench.request_record import record_request
from jaxllm.bench.serve import ROUTES, ask_model, request_headers
from jaxllm.bench.server_process import COMMAND, server_process
from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError, RequestFailedError

CACHES = ("cold", "warm")


def run_startup(
    config: EngineConfig,
    *,
    num_iters: int = 1,
    timeout_s: float = 1800.0,
    json_path: Path | None = None,
    command: Sequence[str] = COMMAND,
) -> dict[str, Any]:
    """Start the server ``num_iters`` times with an empty compilation cache, and again with it full.

    Raises:
        ConfigError: the arguments are wrong.
        EngineDeadError: a server did not start.
        RequestFailedError: it started, but did not answer.
    """
    check_writable(json_path)
    if num_iters < 1 or not timeout_s > 0:
        raise ConfigError("--num-iters must be at least 1, and --timeout above 0.")
    if config.compilation_cache_dir is not None:
        raise ConfigError("--compilation-cache-dir cannot be given: it is what is varied.")
    starts: list[dict[str, Any]] = []
    with tqdm(total=num_iters * len(CACHES), desc="Starts", unit="start") as bar:
        for _ in range(num_iters):
            with tempfile.TemporaryDirectory(prefix="jaxllm-startup-") as directory:
                here = replace(config, compilation_cache_dir=directory)
                for cache in CACHES:
                    starts.append({"cache": cache, **measure_start(here, timeout_s, command)})
                    bar.update()
    report = make_client_report(
        {
            "benchmark": "startup",
            "model": config.model,
            "num_iters": num_iters,
            "medians": {cache: _medians(starts, cache) for cache in CACHES},
            "starts": starts,
        }
    )
    _print(report)
    write_report(report, json_path)
    return report


def measure_start(
    config: EngineConfig, timeout_s: float, command: Sequence[str] = COMMAND
) -> dict[str, Any]:
    """Seconds from the making of the process; the engine's phases beside them, and what it took to
    lower and to compile each program that took long.
    """
    with server_process(config, timeout_s=timeout_s, command=command) as server:
        asyncio.run(_first_token(server.url))
        first_token = time.perf_counter() - server.started
        return {
            "ready_seconds": server.ready_seconds,
            "first_token_seconds": first_token,
            "engine": server.summary,
            "program_seconds": server.program_seconds,
        }


async def _first_token(url: str) -> None:
    base, headers = BaseURL.parse(url), request_headers()
    body = {
        "model": await ask_model(base, headers),
        "prompt": [1],
        "max_tokens": 1,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    route = ROUTES["completions"]
    record = await record_request(base, route, body, headers, expected_tokens=1)
    if record.failure is not None:
        raise RequestFailedError(f"The server is up, but its first answer failed: {record.failure}")


def _medians(starts: list[dict[str, Any]], cache: str) -> dict[str, float]:
    """Of the times seen from outside, and of every phase that the engine tells in seconds."""
    rows = [
        {**{k: v for k, v in start["engine"].items() if k.endswith("_seconds")}, **_outside(start)}
        for start in starts
        if start["cache"] == cache
    ]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: median(row[name] for row in rows) for name in names}


def _outside(start: dict[str, Any]) -> dict[str, float]:
    """The engine calls its own part ``start_seconds``; the rest is imports and processes."""
    times = {name: start[name] for name in ("ready_seconds", "first_token_seconds")}
    engine = start["engine"].get("start_seconds")
    if engine is not None:
        times["around_engine_seconds"] = start["ready_seconds"] - engine
    return times


def _print(report: dict[str, Any]) -> None:
    print(f"model {report['model']}, median of {report['num_iters']}, in seconds")
    medians = report["medians"]
    print(f"{'':<16}" + "".join(f"{cache:>10}" for cache in CACHES))
    for name in dict.fromkeys(name for cache in CACHES for name in medians[cache]):
        values = (medians[cache].get(name) for cache in CACHES)
        cells = "".join(f"{'-' if v is None else format(v, '.2f'):>10}" for v in values)
        label = name.removesuffix("_seconds").replace("_", " ")
        print(f"{label:<16}{cells}")
