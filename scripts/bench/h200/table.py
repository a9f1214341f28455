"""The rows with what was measured, as markdown."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.bench.h200.rows import ROWS, Figures, Row

HEAD = ("", "", "target", "aim", "measured", "met", "compare")


def table(files: Iterable[Path]) -> str:
    """Of the parts in these files; of a figure that is in several, the last."""
    figures: Figures = {}
    for path in files:
        for name, part in json.loads(path.read_text()).items():
            if part.get("figures") is not None:
                figures[name] = figures.get(name, {}) | part["figures"]
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    return "\n".join([*lines, *(_line(cells(row, figures)) for row in ROWS)])


def cells(row: Row, figures: Figures) -> tuple[str, ...]:
    value = _value(row, figures)
    sign = ">= " if row.least else "<= "
    bounds = ["" if bound is None else sign + _number(bound) for bound in (row.target, row.aim)]
    shown = "" if value is None else f"{_number(value)} {row.unit}".strip()
    return (row.group, row.what, *bounds, shown, met(row, value), row.beside)


def met(row: Row, value: float | None) -> str:
    if value is None:
        return "not measured"
    if row.target is None:
        return ""
    if not _keeps(row, value, row.target):
        return "NO"
    return "yes" if row.aim is None or not _keeps(row, value, row.aim) else "yes, and the aim"


def _keeps(row: Row, value: float, bound: float) -> bool:
    return value >= bound if row.least else value <= bound


def _value(row: Row, figures: Figures) -> float | None:
    try:
        value: Any = row.value(figures)
    except (KeyError, IndexError, TypeError, StopIteration, ValueError, ZeroDivisionError):
        return None
    return None if value is None else float(value)


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
