"""``jaxllm plan``: what a model would take of a device's memory, as a table or as JSON.

The engine's own room works it out; it is imported by name, since the server brings no JAX.
"""

import json
import re
from importlib import import_module
from typing import Any

from jaxllm.config.engine import EngineConfig
from jaxllm.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B?", re.IGNORECASE)
_POWERS = "KMGT"
_PARTS = (
    ("weights", "weight_bytes"),
    ("row buffers", "row_buffer_bytes"),
    ("temporaries", "temporary_bytes"),
    ("outputs of two steps", "output_bytes"),
    ("reserve", "reserve_bytes"),
    ("KV cache", "kv_cache_bytes"),
    ("unused", "unused_bytes"),
)


def memory_size(text: str) -> int:
    """Bytes of "141GB" (powers of 1000), "140GiB" (powers of 1024) or a plain number.

    Raises:
        ConfigError: it is neither, or nothing.
    """
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if found is not None:
        number, unit, binary = found.groups()
        power = _POWERS.index(unit.upper()) + 1 if unit else 0
        size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise ConfigError(f"--gpu-memory takes a size such as 141GB or 80GiB, not {text!r}.")
    return size


def run_plan(config: EngineConfig, *, gpu_memory: str | None, as_json: bool) -> None:
    """Print the plan.

    Raises:
        ConfigError: and its subclasses, as for an engine that cannot start.
    """
    size = None if gpu_memory is None else memory_size(gpu_memory)
    report = import_module("jaxllm.worker.memory_report").memory_report(config, size)
    print(json.dumps(report, indent=2) if as_json else "\n".join(_table(report)))


def _table(report: dict[str, Any]) -> list[str]:
    limit = report["limit_bytes"]
    of = "" if limit is None else f": {_gib(limit)} for the engine"
    one = f", each of {report['devices']}" if report["devices"] > 1 else ""
    lines = [f"{report['model']} in {report['dtype']} on {report['device']}{one}{of}", ""]
    notes = {
        "temporaries": report["temporaries"],
        "KV cache": f"{report['kv_blocks']} blocks of {report['block_size']} tokens, "
        f"{report['kv_block_bytes'] / 2**20:.2f} MiB each: {report['kv_tokens']:,} tokens "
        f"in {report['kv_cache_dtype']}{_padding(report)}",
    }
    for name, key in _PARTS:
        if report[key] is not None:
            lines.append(f"{name:<22}{_gib(report[key]):>12}  {notes.get(name, '')}".rstrip())
    lines += ["", f"Requests that the cache holds at once (rows: {report['max_num_seqs']})"]
    for row in report["concurrency"]:
        what = " (max_model_len)" if row["tokens"] == report["max_model_len"] else ""
        lines.append(f"{row['tokens']:>10,} tokens {row['requests']:>10,.2f}{what}")
    lines += ["", f"{'Program':<44}{'temporaries':>12}{'outputs':>12}  MiB"]
    for row in report["programs"]:
        sizes = (row["temporary_bytes"], row["output_bytes"])
        lines.append(f"{row['program']:<44}" + "".join(f"{n / 2**20:>12.1f}" for n in sizes))
    return lines


def _padding(report: dict[str, Any]) -> str:
    own, stored = report["head_dim"], report["cache_head_dim"]
    more = 100 * (stored - own) // own
    return f"; heads of {own} stored as {stored}, {more}% more" if stored > own else ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f} GiB"
