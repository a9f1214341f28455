"""What a decode step of all rows asks of CUDA's driver: its calls by name, per step, as the
profiler sees them. Few launches of graphs and hardly any of kernels: it runs as command buffers.
"""

import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from jaxllm import LLM
from jaxllm.bench.throughput import measure as run
from jaxllm.bench.workload import workload_decode
from scripts.bench.h200.part import Part, main
from scripts.bench.h200.settings import engine

DRIVER = re.compile(r"cu(da)?[A-Z]")
NAMES_KEPT = 40
PROMPT, ANSWER = 16, 64  # tokens: a step of prompts for every 63 that only decode


def measure(part: Part) -> dict[str, Any]:
    with LLM(**engine(part.tiny, part.work)) as llm:
        rows = llm.plan.max_num_seqs
        vocabulary = llm.info.vocab_size
        run(llm, workload_decode(rows, PROMPT, 2).folded(vocabulary))
        before = llm.stats().num_steps
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                began = time.perf_counter()
                run(llm, workload_decode(rows, PROMPT, ANSWER).folded(vocabulary))
                seconds = time.perf_counter() - began
            steps = llm.stats().num_steps - before
            (trace,) = Path(directory).rglob("*.xplane.pb")
            calls, planes = driver_calls(trace)
    return {
        "rows": rows,
        "steps": steps,
        "seconds": seconds,
        "planes": planes,
        "per_step": {
            name: round(number / steps, 3) for name, number in calls.most_common(NAMES_KEPT)
        },
    }


def driver_calls(trace: Path) -> tuple[Counter[str], dict[str, int]]:
    """Events whose name is that of a call of CUDA's driver, and how many events each plane has."""
    calls, planes = Counter[str](), Counter[str]()
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                planes[plane.name] += 1
                if DRIVER.match(event.name):
                    calls[event.name.partition("(")[0]] += 1
    return calls, dict(planes)


if __name__ == "__main__":
    main(measure)
