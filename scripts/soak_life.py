"""Kills, hangs and drains of a server under load, over and over, with the figures of each kind.

    soak_life.py [--kills 20] [--hangs 4] [--drains 10] [--model-kills 4] [--json FILE]

The engine is a fake one, so that the HTTP process and its supervision are what is tested; with
``--model-kills`` it has the default model, and "ready again" is how long that takes to be loaded
with its programs in the compilation cache. Exits with 1 at the first client that was not told the
truth in time. A server is used for two deaths: the third within a minute ends it, as it should.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests, wherever this is started from

from scripts.machine import machine  # noqa: E402
from tests.conftest import write_tiny_tokenizer  # noqa: E402
from tests.server.command import completion, serve_command  # noqa: E402
from tests.server.sse import read_stream  # noqa: E402
from tests.server.strike import STREAMS, Outcome, strike  # noqa: E402

DEATHS_PER_SERVER = 2
STEP_TIMEOUT_S = 2.0
DRAIN_STREAMS = 32
DRAIN_TIMEOUT_S = 0.5
DEFAULT_MODEL, MODEL_TOKENS = "smollm2-135m", 512


def strikes(tokenizer_dir: Path, number: signal.Signals, count: int) -> list[Outcome]:
    """``count`` engines killed or stopped under 64 streams."""
    outcomes: list[Outcome] = []
    flags = ("--max-model-len", "1000000", "--step-timeout", str(STEP_TIMEOUT_S))
    while len(outcomes) < count:
        with serve_command(tokenizer_dir, "paced:50", *flags) as command:
            url = command.url()
            for _ in range(min(DEATHS_PER_SERVER, count - len(outcomes))):
                outcome = asyncio.run(strike(url, command, number))
                outcome.check(1.0 if number == signal.SIGKILL else STEP_TIMEOUT_S + 2.0)
                assert outcome.not_ready_after < (0.5 if number == signal.SIGKILL else 1.5)
                outcomes.append(outcome)
            answer = httpx.post(f"{url}/v1/completions", **completion(3, stream=False))
            assert answer.json()["choices"][0]["text"] == "abc"
            command.process.send_signal(signal.SIGTERM)
            command.end()
    return outcomes


def model_strikes(count: int) -> list[Outcome]:
    """``count`` engines of the default model killed under 64 streams; it answers as before."""
    outcomes: list[Outcome] = []
    flags = ("--max-num-seqs", str(STREAMS), "--max-model-len", str(2 * MODEL_TOKENS))
    asked = completion(16, stream=False, prompt="The capital of France is", temperature=0)
    while len(outcomes) < count:
        with serve_command(None, DEFAULT_MODEL, *flags, worker="jaxllm.worker") as command:
            url = command.url()

            def answer(url: str = url) -> str:
                response = httpx.post(f"{url}/v1/completions", **asked, timeout=60)
                return response.json()["choices"][0]["text"]

            before = answer()
            for _ in range(min(DEATHS_PER_SERVER, count - len(outcomes))):
                struck = strike(url, command, signal.SIGKILL, max_tokens=MODEL_TOKENS)
                outcome = asyncio.run(struck)
                outcome.check(2.0)
                assert answer() == before
                outcomes.append(outcome)
            command.process.send_signal(signal.SIGTERM)
            command.end()
    return outcomes


async def stream_once(http: httpx.AsyncClient, max_tokens: int) -> str:
    """How it ended: done, error, refused (503), or no answer at all. An answer that has begun and
    just stops raises.
    """
    request = http.build_request("POST", "/v1/completions", **completion(max_tokens))
    try:
        response = await http.send(request, stream=True)
    except httpx.TransportError:  # the port was closed, at the latest while it was in its queue
        return "no answer"
    try:
        body = await response.aread()
    finally:
        await response.aclose()
    if response.status_code != 200:
        assert response.status_code == 503 and "retry-after" in response.headers
        return "refused"
    return "done" if read_stream(body).done else "error"


async def drain_under_load(url: str, stop: signal.Signals, pid: int) -> dict[str, int]:
    """SIGTERM while streams run and new ones keep coming; how each of them ended."""
    ends: dict[str, int] = {}
    signalled = asyncio.Event()

    async def client(http: httpx.AsyncClient, seed: int) -> None:
        lengths = random.Random(seed)
        while True:
            how = await stream_once(http, lengths.randint(1, 60))
            ends[how] = ends.get(how, 0) + 1
            if how == "no answer":
                assert signalled.is_set()
                return
            if how == "refused":
                await asyncio.sleep(0.05)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as http:
        clients = [asyncio.create_task(client(http, i)) for i in range(DRAIN_STREAMS)]
        await asyncio.sleep(1.0)
        signalled.set()
        signal.pidfd_send_signal(pid, stop)
        await asyncio.gather(*clients)
    return ends


def drains(tokenizer_dir: Path, count: int) -> tuple[dict[str, int], list[float]]:
    """How all requests of ``count`` drains ended, and seconds from SIGTERM to exit."""
    totals: dict[str, int] = {}
    seconds: list[float] = []
    for _ in range(count):
        flags = ("--drain-timeout", str(DRAIN_TIMEOUT_S))
        with serve_command(tokenizer_dir, "paced:20", *flags) as command:
            url, pid = command.url(), os.pidfd_open(command.process.pid)
            ends = asyncio.run(drain_under_load(url, signal.SIGTERM, pid))
            began = time.monotonic()
            command.end()
            os.close(pid)
            seconds.append(time.monotonic() - began)
        totals = {how: totals.get(how, 0) + ends.get(how, 0) for how in totals | ends}
    return totals, seconds


def figures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Milliseconds, and how many."""
    told = sorted(after for outcome in outcomes for after in outcome.told_after)
    seconds = {
        "told, p50": told[len(told) // 2],
        "told, p99": told[len(told) * 99 // 100],
        "told, last": told[-1],
        "not ready, last": max(outcome.not_ready_after for outcome in outcomes),
        "ready again, last": max(outcome.ready_after for outcome in outcomes),
    }
    counts = {"engines": len(outcomes), "streams told the truth": len(told)}
    return counts | {f"{name}, ms": round(1000 * value) for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills, hangs and drains under load.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--hangs", type=int, default=4)
    parser.add_argument("--drains", type=int, default=10)
    parser.add_argument("--model-kills", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    counts = f"--kills {args.kills} --hangs {args.hangs} --drains {args.drains}"
    counts += f" --model-kills {args.model_kills}"
    report: dict[str, Any] = {"command": f"scripts/soak_life.py {counts}", **machine()}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer_dir = write_tiny_tokenizer(Path(directory))
        if args.kills:
            report["kills"] = figures(strikes(tokenizer_dir, signal.SIGKILL, args.kills))
        if args.hangs:
            report["hangs"] = figures(strikes(tokenizer_dir, signal.SIGSTOP, args.hangs))
        if args.drains:
            totals, seconds = drains(tokenizer_dir, args.drains)
            last = {"exit after the last answer, ms": round(1000 * max(seconds))}
            report["drains"] = {"servers": args.drains, "streams by their end": totals} | last
    if args.model_kills:
        report[f"kills of {DEFAULT_MODEL}"] = figures(model_strikes(args.model_kills))
    print(json.dumps(report, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
