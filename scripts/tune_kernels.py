"""Finds the fastest config of every kernel on the GPU at hand, for pallas_kernels/tuning.

    PYTHONPATH=. python scripts/tune_kernels.py [--op decode sampling] [--minutes 8] [--output FILE]

Tries the small grid of each operation over its SPEED shapes and keeps what has the best geometric
mean of all shapes and gives right answers. The default stays where nothing beats it by more than
MARGIN. Shapes that the code gives different defaults are tuned apart. Entries of operations that
are not named stay as they are in the file.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import jax

from jaxllm.bench.report import make_client_report
from pallas_kernels.bench.operation import Operation, Timed
from pallas_kernels.bench.suite import OPERATIONS, target_platform
from pallas_kernels.tuning.table import FOLDER, TunedConfig, TuningTable, slug

MARGIN = 0.01  # of the default's time: less is noise
RUNS = 20
COMPILERS = 8  # programs compiled at once


@dataclass(frozen=True)
class Candidate:
    config: Any
    fields: dict[str, Any]  # what of the default it replaces
    microseconds: dict[str, float]  # by shape

    @property
    def mean(self) -> float:
        return geometric_mean(self.microseconds.values())


def tune(
    operation: Operation[Any, Any],
    default: Any,
    specs: Sequence[Any],
    *,
    platform: str,
    num_sms: int,
    deadline: float,
) -> TunedConfig | None:
    """The best entry for these shapes, which have this default; None if no config is right.

    ``deadline``, of time.monotonic(), is kept by trying fewer configs, but at least the default.
    """
    tried: list[Candidate] = []
    for fields in operation.grid(default, num_sms):
        if tried and time.monotonic() > deadline:
            print(f"  {_shown(fields)}: no time left", flush=True)
            continue
        outcome = attempt(operation, default, fields, specs, platform)
        if isinstance(outcome, Candidate):
            tried.append(outcome)
            print(f"  {_shown(fields)}: {outcome.mean:.1f} us", flush=True)
        else:
            print(f"  {_shown(fields)}: {outcome}", flush=True)
    own = next((item for item in tried if item.config == default), None)
    limit = float("inf") if own is None else own.mean * (1 - MARGIN)
    better = sorted((item for item in tried if item.mean < limit), key=lambda item: item.mean)
    wrong = operation.checker()
    for best in (*better, *(() if own is None else (own,))):
        error = attempt_check(wrong, best.config)
        if error is None:
            replaced = {name: getattr(default, name) for name in best.fields}
            speedup = None if own is None else own.mean / best.mean
            print(f"  kept {_shown(best.fields)}", flush=True)
            return TunedConfig(
                operation.name,
                replaced,
                best.fields,
                best.microseconds,
                speedup,
                made_by(),
                operation.where(specs[0]),
            )
        print(f"  {_shown(best.fields)} is WRONG: {error}", flush=True)
    return None


def attempt(
    operation: Operation[Any, Any],
    default: Any,
    fields: dict[str, Any],
    specs: Sequence[Any],
    platform: str,
) -> Candidate | str:
    """The config timed over all shapes, or why it cannot be: one failure must not end the sweep."""
    try:
        config = dataclasses.replace(default, **fields)
        for spec in specs:
            if reason := operation.refuses(spec, config, platform):
                return reason
        with ThreadPoolExecutor(COMPILERS) as pool:
            programs = list(pool.map(lambda spec: operation.timed(spec, config), specs))
            list(pool.map(lambda program: jax.block_until_ready(program.dispatch()), programs))
        times = [_seconds(program) * 1e6 for program in programs]
    except Exception as error:  # whatever a compiler raises
        return f"FAILED {type(error).__name__}: {str(error)[:300]}"
    return Candidate(config, fields, dict(zip(map(operation.label, specs), times, strict=True)))


def _seconds(program: Timed) -> float:
    """Without the gaps between launches, where a profiler tells: beside a kernel of 2 us they are
    most of the time, and in the engine command buffers close them.
    """
    return program.busy_seconds() or program.seconds(RUNS)


def attempt_check(wrong: Callable[[Any], str | None], config: Any) -> str | None:
    try:
        return wrong(config)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


def by_default(
    operation: Operation[Any, Any], platform: str = "sm_90"
) -> list[tuple[Any, list[Any]]]:
    """The shapes to tune on that the kernel takes, by the config that the code gives them, and what
    else tells them apart.
    """
    groups: dict[Any, tuple[Any, list[Any]]] = {}
    for spec in operation.tuned_on:
        if operation.refuses(spec, operation.default(spec), platform) is not None:
            continue  # the engine gives it to plain XLA
        default, where = operation.default(spec), operation.where(spec)
        groups.setdefault((default, tuple(where.items())), (default, []))[1].append(spec)
    return list(groups.values())


def made_by() -> dict[str, Any]:
    report = make_client_report({})
    return {
        "command": ["python", *sys.argv],
        "commit": report["commit"],
        "versions": report["versions"],
    }


def merged(path: Path, device: str, names: set[str], entries: list[TunedConfig]) -> str:
    """The file with ``entries`` in place of those of the operations ``names``."""
    kept: list[TunedConfig] = []
    if path.is_file():
        old = TuningTable.from_json(path.read_text(encoding="utf-8"))
        kept = [entry for entry in old.tuned if entry.op not in names]
    ordered = sorted((*kept, *entries), key=lambda entry: entry.op)
    return TuningTable(device, tuple(ordered)).to_json()


def _shown(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Tune the kernels on the GPU at hand.")
    parser.add_argument("--op", nargs="+", default=list(OPERATIONS), choices=list(OPERATIONS))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (%(default)s)")
    parser.add_argument("--output", type=Path, help="default: pallas_kernels/tuning/DEVICE.json")
    args = parser.parse_args()
    device, platform = jax.devices()[0], target_platform()
    if platform != "sm_90":
        print(f"error: the kernels are for Hopper GPUs; this is {device}", file=sys.stderr)
        return 2
    path = args.output or FOLDER / f"{slug(device.device_kind)}.json"
    jobs = [
        (OPERATIONS[name], default, specs)
        for name in dict.fromkeys(args.op)
        for default, specs in by_default(OPERATIONS[name], platform)
    ]
    num_sms = getattr(device, "core_count", 132)
    end = time.monotonic() + args.minutes * 60
    entries: list[TunedConfig] = []
    done: set[str] = set()
    for index, (operation, default, specs) in enumerate(jobs):
        now = time.monotonic()
        share = (end - now) / (len(jobs) - index)
        print(f"{operation.name}, {len(specs)} shapes", flush=True)
        target: dict[str, Any] = {"platform": platform, "num_sms": num_sms}
        entry = tune(operation, default, specs, **target, deadline=now + share)
        entries += [] if entry is None else [entry]
        done.add(operation.name)
        path.write_text(merged(path, device.device_kind, done, entries), encoding="utf-8")
    print(f"wrote {path}")
    return 0 if len(entries) == len(jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
