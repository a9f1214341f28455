"""Does a decode step run as command buffers (CUDA graphs)? What XLA made of the decode program of
all rows: its sequence of thunks as XLA dumps it, counted inside of command buffers and beside them.

The program is compiled anew for that, into a directory that is thrown away.
"""

import os
import re
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxllm.config.engine import EngineConfig
from jaxllm.config.plan import BatchKind
from scripts.bench.h200.part import Part, main
from scripts.bench.h200.settings import engine

THUNK = re.compile(r"\bk[A-Z][A-Za-z]+")
TEXT_KEPT = 20_000  # characters of a sequence
MOST_KEPT = 4  # sequences: the model's, after each pass of XLA, and a sampler's
NAMES_KEPT = 200


def measure(part: Part) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="jaxllm-dump-") as name:
        dump = Path(name)
        # XLA reads them with the first use of JAX.
        dumping = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dumping}"
        config = EngineConfig(**engine(part.tiny, part.work))
        config = replace(config, compilation_cache_dir=str(dump / "programs"))
        programs = compile_decode(config)
        thunks = [sequence(path) for path in sorted(dump.glob("*thunk_sequence*"))]
        dumped = sorted(path.name for path in dump.iterdir())
    thunks.sort(key=lambda found: found["thunks"], reverse=True)
    return {"programs": programs, "thunks": thunks[:MOST_KEPT], "dumped": dumped[:NAMES_KEPT]}


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


if __name__ == "__main__":
    main(measure)
