"""Runs parts one after the other, each as a process with a limit of time, and keeps what they found
in one file, which is written anew after each of them.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from scripts.bench.h200.parts import PartOfRun, Where
from scripts.bench.h200.settings import ROOT

LAST_WORDS = 2000  # characters of a part's output that are kept


def run(
    parts: list[PartOfRun], where: Where, out: Path, label: str, seconds: float = float("inf")
) -> bool:
    """``out/LABEL.json`` has the figures by part, ``out/LABEL.log`` all output. True: no part
    failed. What is not expected to end within ``seconds`` is not begun.
    """
    out.mkdir(parents=True, exist_ok=True)
    where.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    begin = time.perf_counter()
    with (out / f"{label}.log").open("w") as log:
        for part in parts:
            if time.perf_counter() - begin + part.seconds > seconds:
                print(f"{part.name:22} not begun", flush=True)
                continue
            found[part.name] = _run(part, where, log)
            (out / f"{label}.json").write_text(json.dumps(found, indent=1) + "\n")
            one = found[part.name]
            spent = time.perf_counter() - begin
            print(
                f"{part.name:22} {one['outcome']:12} {one['seconds']:6.1f} s of {part.seconds} s "
                f"expected, {spent:6.1f} s in all",
                flush=True,
            )
            if one["outcome"] not in ("ran", "left out"):
                print(one["last_words"], flush=True)
    return all(one["outcome"] in ("ran", "left out") for one in found.values())


def _run(part: PartOfRun, where: Where, log: Any) -> dict[str, Any]:
    command = part.command(where, part.name)
    if command is None:
        return {"outcome": "left out", "seconds": 0.0}
    result = where.result(part.name)
    result.unlink(missing_ok=True)
    print(f"\n=== {part.name}: {' '.join(command)}", file=log, flush=True)
    output, begin, late = where.work / f"{part.name}.out", time.perf_counter(), False
    with output.open("w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(part.limit)
        except subprocess.TimeoutExpired:
            late, code = True, 124
        finally:
            _end_group(process)
    text = output.read_text(errors="replace")
    log.write(text)
    log.flush()
    figures = _printed(text) if part.prints else _read(result)
    if code == 0 and figures is None:
        code = 1
    outcome = "too late" if late else "ran" if code == 0 else f"failed ({code})"
    report = {
        "outcome": outcome,
        "seconds": round(time.perf_counter() - begin, 1),
        "command": command,
        "figures": figures,
    }
    return report if outcome == "ran" else report | {"last_words": text[-LAST_WORDS:]}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _printed(text: str) -> Any:
    """The object that begins in a line of its own."""
    begin = text.find("\n{\n") + 1
    try:
        return json.JSONDecoder().raw_decode(text, begin)[0]
    except ValueError:
        return None


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """What a part started must not take the card from the next."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _python_path() -> str:
    more = os.environ.get("PYTHONPATH", "")
    return f"{ROOT}{os.pathsep}{more}" if more else str(ROOT)
