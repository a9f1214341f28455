"""Is a decode step launched as command buffers (CUDA graphs)? Seen in two ways.

``thunks``: what XLA made of the decode program of all rows: its sequence of thunks as XLA dumps it,
counted inside of command buffers and outside. The program is compiled anew for that, into a
directory that is thrown away.

``calls``: an engine decodes under the profiler; calls of CUDA's driver by name, per step.
"""

import os
import re
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxllm.bench.throughput import measure as run
from jaxllm.bench.workload import workload_decode
from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import BatchKind
from scripts.bench.h200.part import Part, main
from scripts.bench.h200.settings import engine

THUNK = re.compile(r"\bk[A-Z][A-Za-z]+")
TEXT_KEPT = 20_000  # characters of a sequence
PROMPT, ANSWER = 16, 64  # tokens, under the profiler


def measure(part: Part) -> dict[str, Any]:
    dump = Path(tempfile.mkdtemp(prefix="jaxllm-dump-"))
    # XLA reads them when it starts, with the first use of JAX.
    dumping = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dumping}"
    config = EngineConfig(**engine(part.tiny, part.work))
    programs = compile_decode(replace(config, compilation_cache_dir=str(dump / "programs")))
    thunks = [sequence(path) for path in sorted(dump.glob("*thunk_sequence*"))]
    thunks.sort(key=lambda found: found["thunks"], reverse=True)
    dumped = sorted(path.name for path in dump.iterdir())
    return {
        "programs": programs,
        "thunks": thunks[:4],  # the model's, as text after each pass of XLA, then samplers'
        "dumped": dumped[:200],
        "calls": profile(config),
    }


def compile_decode(config: EngineConfig) -> list[str]:
    """The decode program of all rows and what belongs to its step; their names."""
    from jaxllm.config.env import cpu_count
    from jaxllm.runner.memory import this_device
    from jaxllm.worker.wiring import configure_jax, draft_programs, open_model

    configure_jax(config, preallocate=False)
    programs = draft_programs(config, open_model(config), this_device())
    plan = programs.plan
    largest = max(bucket for bucket in plan.buckets if bucket.kind is BatchKind.DECODE)
    programs.settle(replace(plan, buckets=(largest,)))
    programs.compile(threads=cpu_count(), progress=False)
    return [program.name for program in programs.working_memory().programs]


def sequence(path: Path) -> dict[str, Any]:
    """A thunk a line, those of a command buffer below it and indented further."""
    text = path.read_text(errors="replace")
    kinds, inside, depth = Counter[str](), Counter[str](), None
    for line in text.splitlines():
        found = THUNK.search(line)
        if found is None:
            continue
        indent = len(line) - len(line.lstrip())
        if depth is not None and indent <= depth:
            depth = None
        (kinds if depth is None else inside)[found[0]] += 1
        if depth is None and found[0] == "kCommandBuffer":
            depth = indent
    return {
        "file": path.name,
        "thunks": sum(kinds.values()) + sum(inside.values()),
        "command_buffers": kinds["kCommandBuffer"],
        "outside": dict(kinds),
        "inside": dict(inside),
        "text": text[:TEXT_KEPT],
    }


def profile(config: EngineConfig) -> dict[str, Any]:
    import jax

    from jaxllm import LLM

    with LLM(**{name: getattr(config, name) for name in config.__dataclass_fields__}) as llm:
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
        "per_step": {name: round(number / steps, 3) for name, number in calls.most_common(40)},
    }


def driver_calls(trace: Path) -> tuple[Counter[str], dict[str, int]]:
    """Events whose name is that of a call of CUDA's driver, and how many events each plane has."""
    from jax.profiler import ProfileData

    calls, planes = Counter[str](), Counter[str]()
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                planes[plane.name] += 1
                if re.match(r"cu[A-Z]|cuda[A-Z]", event.name):
                    calls[event.name.partition("(")[0]] += 1
    return calls, dict(planes)


if __name__ == "__main__":
    main(measure)
