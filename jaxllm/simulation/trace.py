"""Which requests came when, and how long they were: from a journal, a file, or a workload."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from jaxllm.bench.workload import make_workload
from jaxllm.config.plan import EnginePlan
from jaxllm.errors import ConfigError
from jaxllm.journal.file import MAGIC, read_journal
from jaxllm.journal.records import Added
from jaxllm.journal.replay import read_header, replay
from jaxllm.messages import StepOutputs


class TraceRequest(msgspec.Struct, frozen=True):
    """One line of a JSONL trace."""

    arrival: float  # seconds after the beginning
    prompt: int  # tokens
    output: int  # tokens


def read_trace(path: Path) -> list[TraceRequest]:
    """Of a journal, or of a file with one JSON object a line: arrival, prompt, output.

    Raises:
        ConfigError: it is neither, or holds no request.
        JournalError: it is not a whole journal.
    """
    try:
        if is_journal(path):
            trace = _of_journal(path)
        else:
            trace = msgspec.json.Decoder(TraceRequest).decode_lines(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--trace {path}: {error.strerror}.") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--trace {path} is no trace: {error}") from error
    if not trace or min(min(r.prompt, r.output, r.arrival + 1) for r in trace) < 1:
        raise ConfigError(f"--trace {path} needs requests with a prompt and an output.")
    return sorted(trace, key=lambda request: request.arrival)


def is_journal(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def journal_plan(path: Path) -> EnginePlan:
    """Raises JournalError."""
    return read_header(read_journal(path), path).plan


def make_trace(workload: str, n: int | None, rate: float, seed: int = 0) -> list[TraceRequest]:
    """Of a workload of ``jaxllm bench``; Poisson arrivals at ``rate`` a second (inf: at once)."""
    work, random, now = make_workload(workload, n), Random(seed), 0.0
    trace: list[TraceRequest] = []
    for prompt, output in zip(work.prompts, work.output_lens, strict=True):
        trace.append(TraceRequest(now, len(prompt), output))
        now += random.expovariate(rate) if rate != float("inf") else 0.0
    return trace


def read_report(path: Path) -> dict[str, Any]:
    """Of ``jaxllm bench throughput``. Raises ConfigError if it is none."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ConfigError(f"--against {path}: {error.strerror}.") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--against {path} is no report: {error}") from error
    if report.get("benchmark") != "throughput":
        raise ConfigError(f"--against {path} is no report of jaxllm bench throughput.")
    return report


def report_trace(report: dict[str, Any]) -> list[TraceRequest]:
    """The requests of a throughput benchmark, all at once."""
    name, n = report["workload"], report["n"]
    lengths = () if name == "b" else (report["in_tokens"] // n, report["out_tokens"] // n)
    work = make_workload(name, n, *lengths)
    pairs = zip(work.prompts, work.output_lens, strict=True)
    return [TraceRequest(0.0, len(prompt), length) for prompt, length in pairs]


class Times:
    """When requests came and when each had its tokens."""

    def __init__(self) -> None:
        self.arrival: dict[str, float] = {}
        self.tokens: dict[str, list[float]] = {}

    def came(self, request_id: str, now: float) -> None:
        self.arrival[request_id], self.tokens[request_id] = now, []

    def told(self, outputs: StepOutputs | None, now: float) -> None:
        if outputs is None:
            return
        for request_id in outputs.request_ids:
            self.tokens[request_id].append(now)
        for event in outputs.events:
            self.tokens[event.request_id] += [now] * len(event.new_token_ids)

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        last = (tokens[-1] for tokens in self.tokens.values() if tokens)
        return max(last, default=0.0) - min(self.arrival.values(), default=0.0)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))

    def first(self) -> list[float]:
        """Seconds to the first token, by request."""
        return [t[0] - self.arrival[name] for name, t in self.tokens.items() if t]

    def gaps(self) -> list[float]:
        """Seconds between a request's tokens."""
        return [b - a for t in self.tokens.values() for a, b in pairwise(t)]


def journal_times(path: Path) -> Times:
    """As they were, by the engine's own clock. Raises JournalError."""
    times = Times()
    for record in read_journal(path):
        if isinstance(record, Added):
            times.came(record.request.request_id, record.time)
    replay(path, told=times.told)
    return times


def _of_journal(path: Path) -> list[TraceRequest]:
    """What was added between two turns of the engine came at once: to take in 500 prompts takes
    some milliseconds, but the next step sees them all.
    """
    outputs = Counter({name: len(tokens) for name, tokens in journal_times(path).tokens.items()})
    trace: list[TraceRequest] = []
    began = came = None
    for record in read_journal(path):
        if not isinstance(record, Added):
            came = None
            continue
        came = record.time if came is None else came
        began = came if began is None else began
        request, length = record.request, outputs[record.request.request_id]
        if length:
            trace.append(TraceRequest(came - began, len(request.prompt_token_ids), length))
    return trace


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of them do not exceed; nan of none."""
    ordered = sorted(values)
    return ordered[max(ceil(share * len(ordered)) - 1, 0)] if ordered else float("nan")
