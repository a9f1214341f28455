"""Predictions as a table, and as a picture (extra ``plot``)."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.simulation.capacity import Prediction, best

COLUMNS = (
    ("rows", "max_num_seqs", 1, "d"),
    ("seconds", "seconds", 1, ".2f"),
    ("output tok/s", "output_tokens_per_second", 1, ".1f"),
    ("TTFT p50 ms", "ttft_p50", 1000, ".1f"),
    ("p99 ms", "ttft_p99", 1000, ".1f"),
    ("ITL p50 ms", "itl_p50", 1000, ".1f"),
    ("p99 ms", "itl_p99", 1000, ".1f"),
    ("refused", "num_refused", 1, "d"),
    ("preempted", "num_preemptions", 1, "d"),
)
COMPARED = COLUMNS[1:7]


def table(predictions: Sequence[Prediction]) -> list[str]:
    lines = ["  ".join(f"{title:>12}" for title, *_ in COLUMNS)]
    for prediction in predictions:
        lines.append("  ".join(_cell(prediction, column) for column in COLUMNS))
    return [*lines, f"best max_num_seqs: {best(predictions).max_num_seqs}"]


def errors(predicted: Prediction, measured: Prediction) -> list[str]:
    """Both, and by how much the prediction is off."""
    lines = [f"{'':>14}{'measured':>14}{'predicted':>14}{'error':>9}"]
    for column in COMPARED:
        title, name, *_ = column
        one, other = getattr(measured, name), getattr(predicted, name)
        off = f"{(other - one) / one:+.1%}" if one else "-"
        cells = _cell(measured, column), _cell(predicted, column)
        lines.append(f"{title:>14}{cells[0]:>14}{cells[1]:>14}{off:>9}")
    return lines


def _cell(prediction: Prediction, column: tuple[str, str, int, str]) -> str:
    _, name, factor, form = column
    return f"{format(getattr(prediction, name) * factor, form):>12}"


def plot(predictions: Sequence[Prediction], path: Path) -> None:
    """Throughput and latency against rows, as PNG.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        figure_class: Any = import_module("matplotlib.figure").Figure  # no window, no global state
    except ModuleNotFoundError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'jaxllm[plot]'.") from error
    rows = [p.max_num_seqs for p in predictions]
    figure = figure_class(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(rows, [p.output_tokens_per_second for p in predictions], marker="o")
    upper.set_ylabel("output tokens/s")
    upper.axvline(best(predictions).max_num_seqs, linestyle=":", color="grey")
    for name, label in (("ttft_p99", "TTFT p99"), ("itl_p99", "ITL p99"), ("itl_p50", "ITL p50")):
        values = [getattr(p, name) * 1000 for p in predictions]
        lower.plot(rows, values, marker="o", label=label)
    lower.set(xlabel="max_num_seqs", ylabel="ms", xscale="log", yscale="log")
    lower.set_xticks(rows, [str(n) for n in rows])
    lower.minorticks_off()
    lower.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}.") from error
