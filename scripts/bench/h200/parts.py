"""The parts of a run, in the order of importance: what each executes, and how many seconds it is
expected to take on one H200.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.h200 import settings
from scripts.bench.h200.journal import JOURNAL

SCRIPTS = Path("scripts")  # from where parts run, as results name it


@dataclass(frozen=True)
class Where:
    """One run: its sizes, and what it was given."""

    tiny: bool
    work: Path
    tokenizer: Path | None = None
    gguf: Path | None = None
    reference_python: Path = Path(sys.executable)  # with torch and transformers

    def result(self, name: str) -> Path:
        return self.work / f"{name}.json"


# The command without ``--json``; None: it needs what the run was not given.
Command = Callable[[Where, str], Sequence[str] | None]


@dataclass(frozen=True)
class PartOfRun:
    name: str
    seconds: int  # expected on the card
    command: Command
    prints: bool = False  # its figures, instead of writing them

    @property
    def limit(self) -> int:
        """Seconds after which it is stuck."""
        return 2 * self.seconds + 60


def module(where: Where, name: str) -> list[str]:
    """One of this folder."""
    command = [sys.executable, "-m", f"scripts.bench.h200.{name.replace('-', '_')}"]
    command += ["--work", str(where.work), *["--tiny"] * where.tiny]
    return [*command, "--json", str(where.result(name))]


def sequential(where: Where, name: str) -> list[str]:
    return [str(where.reference_python), *module(where, name)[1:]]


def jaxllm(*arguments: str, **more: Any) -> Command:
    """``jaxllm`` for the engine that has the card to itself. ``tiny``: arguments in place of these
    on a CPU; the rest: fields of its config.
    """
    tiny = more.pop("tiny", ())

    def command(where: Where, name: str) -> list[str]:
        fields = settings.engine(where.tiny, where.work) | more
        if "journal" in fields:
            fields["journal"] = str(where.work / fields["journal"])
        given = [*(tiny if where.tiny and tiny else arguments), *settings.flags(fields)]
        output = [] if given[0] == "plan" else ["--json", str(where.result(name))]
        return [sys.executable, "-P", "-m", "server", *given, *output]

    return command


def prefix_cache(only: str, *arguments: str, **more: Any) -> Command:
    def command(where: Where, name: str) -> list[str]:
        fields = settings.shared(where.tiny, where.work) | more
        model = fields.pop("model")
        if where.tiny and only == "urgent":
            fields |= {"num_gpu_blocks_override": 57}
        given = ["--only", only, "--model", model, "--settings", json.dumps(fields), *arguments]
        sizes = ["--repeats", "1"] if where.tiny else ["--full"]
        script = str(SCRIPTS / "bench" / "prefix_cache.py")
        return [sys.executable, script, *given, *sizes, "--json", str(where.result(name))]

    return command


def grammar(where: Where, name: str) -> list[str] | None:
    if where.tokenizer is None:
        return None
    fields = settings.with_tokenizer(where.tiny, where.work, where.tokenizer)
    model = fields.pop("model")
    given = ["--model", model, "--settings", json.dumps(fields)]
    given += ["--rows", "4", "--steps", "8", "--repeats", "1"] if where.tiny else ["--rows", "64"]
    script = str(SCRIPTS / "bench" / "grammar_cost.py")
    return [sys.executable, script, *given, "--json", str(where.result(name))]


def parity(where: Where, name: str) -> list[str] | None:
    if where.gguf is None:
        return None
    given = [str(where.gguf), "--compilation-cache-dir", str(where.work / "programs")]
    script = str(SCRIPTS / "greedy_parity.py")
    return [sys.executable, script, *given, "--json", str(where.result(name))]


def _latency(batch_sizes: str, input_len: int, output_len: int, num_iters: int) -> Command:
    sizes = ["--batch-size", *batch_sizes.split()]
    lengths = ["--input-len", str(input_len), "--output-len", str(output_len)]
    tiny = ("bench", "latency", "--batch-size", "2", "--input-len", "16", "--output-len", "8")
    iterations = ("--num-iters", str(num_iters))
    return jaxllm("bench", "latency", *sizes, *lengths, *iterations, tiny=tiny)


def _throughput(workload: str, **fields: Any) -> Command:
    tiny = ("bench", "throughput", "--workload", "decode", "--num-prompts", "4")
    tiny += ("--input-len", "16", "--output-len", "8")
    return jaxllm("bench", "throughput", "--workload", workload, tiny=tiny, **fields)


PARTS = {
    part.name: part
    for part in (
        PartOfRun("startup", 95, module),  # before all others: its programs are theirs
        PartOfRun("latency", 120, _latency("1 8 64 256", 960, 129, 2)),
        PartOfRun("ttft-2048", 35, _latency("1", 2048, 8, 5)),
        PartOfRun("ttft-8192", 30, _latency("1", 8192, 8, 5)),
        PartOfRun("workload-a", 20, _throughput("a")),
        PartOfRun("workload-b", 25, _throughput("b")),
        PartOfRun("plan", 10, jaxllm("plan", "--json"), prints=True),
        PartOfRun("kernels", 90, module),
        PartOfRun("thunks", 40, module),
        PartOfRun("launches", 30, module),
        PartOfRun("served", 25, module),
        PartOfRun("sequential", 60, sequential),
        PartOfRun("prefix-conversations", 85, prefix_cache("conversations")),
        PartOfRun("prefix-idle", 45, prefix_cache("idle")),
        PartOfRun("prefix-unshared", 110, prefix_cache("unshared")),
        PartOfRun("prefix-urgent", 100, prefix_cache("urgent", "--repeats", "2")),
        PartOfRun("swapping", 40, module),
        PartOfRun("workload-b-journal", 25, _throughput("b", journal=JOURNAL)),
        PartOfRun("mixing", 75, module),
        PartOfRun("parity", 90, parity),
        PartOfRun("grammar", 20, grammar),
        PartOfRun("variants", 120, module),
        PartOfRun("latents", 70, module),
        PartOfRun("layers", 60, module),
        PartOfRun("journal", 5, module),
    )
}
