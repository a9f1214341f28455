"""What one step costs the scheduler: decide it and take in its results, on the host alone.

    host_step.py [--rows 256] [--waiting 10000] [--steps 1000] [--json FILE]

All rows are taken. "decode": every request goes on; "turnover": in each step some end and as many
arrive, so that rows are given away. Each with few and with many requests waiting, in turns, for
every policy. Times are medians; the machine's other work shows in the 99th percentile.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tests, wherever this is started from

from jaxllm.config.scheduling import POLICY_NAMES, SchedulingConfig  # noqa: E402
from jaxllm.core.scheduler import Scheduler  # noqa: E402
from jaxllm.engine.executor import ModelRunnerOutput  # noqa: E402
from tests.fakes.plans import make_plan, make_request  # noqa: E402

MAX_MODEL_LEN = 16384
PROMPT = 16
FEW = 8  # waiting
TURNOVER_TOKENS = 64  # so that one row in 64 is given away in each step
WARM_UP = 100


def step_seconds(policy: str, rows: int, waiting: int, turnover: bool) -> Iterator[float]:
    """Seconds of schedule and update, step after step."""
    plan = make_plan(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=rows,
        max_num_batched_tokens=8192,
        block_size=64,
        num_blocks=rows * MAX_MODEL_LEN // 64 + 1,
    )
    scheduler = Scheduler(plan, SchedulingConfig(policy))
    number = 0
    while True:
        while len(scheduler.requests) < rows + waiting:
            length = TURNOVER_TOKENS if turnover else MAX_MODEL_LEN - PROMPT
            if turnover and number < rows:  # to end as if they had not begun together
                length = 1 + length * (number + 1) // rows
            # Without turnover nobody is preempted, so nobody that waits is better.
            priority = number % 3 if turnover else min(number // rows, 1)
            request = make_request(
                f"r{number}", PROMPT, length, priority=priority, tenant=str(number % 16)
            )
            scheduler.add_request(request)
            number += 1
        started = time.perf_counter()
        step = scheduler.schedule()
        scheduled = time.perf_counter()
        if step is None:
            raise RuntimeError("Nothing can be scheduled.")
        n = step.rows.size
        output = ModelRunnerOutput(step.step_id, np.full(n, 9, np.int32), np.full(n, True))
        fetched = time.perf_counter()
        scheduler.update(step, output)
        yield scheduled - started + time.perf_counter() - fetched


def measure(policy: str, load: str, rows: int, waiting: int, steps: int) -> dict[str, Any]:
    """Few and many waiting take turns, so that both see the same machine."""
    runs = [step_seconds(policy, rows, n, load == "turnover") for n in (FEW, waiting)]
    seconds: list[list[float]] = [[], []]
    for i in range(WARM_UP + steps):
        for run, found in zip(runs, seconds, strict=True):
            took = next(run)
            if i >= WARM_UP:
                found.append(took)
    few, many = (statistics.median(found) * 1e6 for found in seconds)
    return {
        "policy": policy,
        "load": load,
        "few_waiting_us": round(few, 1),
        "many_waiting_us": round(many, 1),
        "many_waiting_p99_us": round(float(np.quantile(seconds[1], 0.99)) * 1e6, 1),
        "many_over_few": round(many / few, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What one step costs the scheduler.")
    parser.add_argument("--rows", type=int, default=256, help="that run")
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1000, help="measured")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    results = []
    for policy in POLICY_NAMES:
        for load in ("decode", "turnover"):
            result = measure(policy, load, args.rows, args.waiting, args.steps)
            results.append(result)
            print("  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    if args.json:
        about = {"rows": args.rows, "few": FEW, "waiting": args.waiting, "steps": args.steps}
        args.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
