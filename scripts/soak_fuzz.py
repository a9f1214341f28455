"""Bad and random requests against the server over a fake device, and what came of them.

    soak_fuzz.py [--requests 20000] [--seed 1] [--json FILE]

A part is what schemathesis makes of our /openapi.json (``scripts/clients.sh`` installs it); of the
rest two thirds are changed bodies and one third changed or random bytes on a connection. Exits with
1 at any unexpected status, any answer that is not as its schema says, or a server that is not as it
was.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests, wherever this is started from

from scripts.machine import machine  # noqa: E402
from tests.conftest import write_tiny_tokenizer  # noqa: E402
from tests.server import fuzz  # noqa: E402
from tests.server.attacked_server import AttackedServer, attacked_server  # noqa: E402
from tests.server.schema_fuzz import (  # noqa: E402
    ACCEPTANCE,
    CHECKS,
    MAX_BODY_BYTES,
    PROGRAM,
    run_schemathesis,
)

ROUND = 1000
SCHEMA_EXAMPLES = 200  # of every operation
SCHEMA_LIMIT_S = 3600


def soak(server: AttackedServer, requests: int, seed: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    failures: list[str] = []
    if PROGRAM.exists():
        results["schemathesis"] = by_schema(server, requests, seed, failures)
    left = requests - sum(part["requests"] for part in results.values())
    results["bodies"] = by_rounds(
        server,
        lambda number: fuzz.send_bodies(server.url, number, ROUND),
        left * 2 // 3,
        seed,
        failures,
    )
    results["raw"] = by_rounds(
        server, lambda number: fuzz.send_raw(server.port, number, ROUND), left // 3, seed, failures
    )
    results["total"] = sum(part["requests"] for part in results.values())
    results["failures"] = failures
    return results


def by_schema(
    server: AttackedServer, requests: int, seed: int, failures: list[str]
) -> dict[str, Any]:
    began = time.monotonic()
    examples = max(1, SCHEMA_EXAMPLES * requests // 20_000)
    with server.as_before():
        report = run_schemathesis(
            server.url,
            max_examples=examples,
            seed=seed,
            limit_s=SCHEMA_LIMIT_S,
            checks=(*CHECKS, ACCEPTANCE),
        )
    if not report.passed:
        failures.append(report.output)
    return {"requests": report.num_requests, "seconds": round(time.monotonic() - began, 1)}


def by_rounds(
    server: AttackedServer,
    send: Callable[[int], fuzz.Tally],
    requests: int,
    seed: int,
    failures: list[str],
) -> dict[str, Any]:
    """At least so many; whether the server is as it was is looked at after every thousand."""
    began, statuses = time.monotonic(), Counter[int]()
    for number in range(-(-requests // ROUND)):
        with server.as_before():
            tally = send(seed * 10**6 + number)
        failures += tally.failures
        statuses += tally.statuses
    return {
        "requests": statuses.total(),
        "statuses": {str(status): statuses[status] for status in sorted(statuses)},
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Bad and random requests.")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    beside = machine()
    with (
        tempfile.TemporaryDirectory() as directory,
        attacked_server(
            write_tiny_tokenizer(Path(directory)), step_seconds=0, max_body_bytes=MAX_BODY_BYTES
        ) as server,
    ):
        results = soak(server, args.requests, args.seed)
    command = f"scripts/soak_fuzz.py --requests {args.requests} --seed {args.seed}"
    results = {"command": command, **beside, **results}
    print(json.dumps(results, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(1 if results["failures"] else 0)


if __name__ == "__main__":
    main()
