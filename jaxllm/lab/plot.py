"""``jaxllm lab show``: an attention variant as one PNG (extra ``plot``)."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.lab.bench import Speed
from jaxllm.lab.maps import AttentionMaps
from jaxllm.lab.picture import SCORES, Picture

MOST_DRAWN = 4  # heads that differ
MOST_MAPPED = 9  # heads of a layer
_MOST_LABELS = 48  # tokens with their text along an axis


def plot(
    title: str,
    picture: Picture,
    speeds: Sequence[Speed],
    path: Path,
    tokens: Sequence[str] = (),
) -> None:
    """A row of pictures for each head that differs: what is seen, what is added to a score
    of one, what all scores become. Below them speed against context, if it was measured.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    drawn = min(len(picture.heads), MOST_DRAWN)
    panels = (drawn if picture.changes_scores else 1) + bool(speeds)
    figure = _figure(figsize=(15, 4.6 * panels), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    parts = np.atleast_1d(figure.subfigures(panels, 1))
    if picture.changes_scores:
        for index in range(drawn):
            _head(parts[index], picture, index, tokens)
    else:
        axes = np.atleast_1d(parts[0].subplots(1, max(drawn, 2)))
        for index in range(drawn):
            _seen(axes[index], picture, index, tokens)
            axes[index].set_title(f"{_name(picture, index)}: what is seen (black)")
        for axis in axes[drawn:]:
            axis.set_axis_off()
    if speeds:
        _speeds(parts[-1], speeds)
    _save(figure, path)


def plot_maps(title: str, maps: AttentionMaps, path: Path) -> None:
    """A row of pictures for each layer: the mean of all heads, then the first heads.

    Raises:
        ConfigError: as ``plot``.
    """
    drawn = min(maps.probs.shape[1], MOST_MAPPED)
    rows, columns = len(maps.layers), 1 + drawn
    figure = _figure(figsize=(5 + 2.6 * drawn, 4.6 * rows), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    ratios = [1.7, *[1.0] * drawn]
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios)
    for row, (layer, probs) in enumerate(zip(maps.layers, maps.probs, strict=True)):
        _map(axes[row, 0], probs.mean(axis=0))
        axes[row, 0].set_title(f"layer {layer}: mean of {probs.shape[0]} heads")
        _label(axes[row, 0], maps.tokens)
        for head in range(drawn):
            _map(axes[row, 1 + head], probs[head])
            axes[row, 1 + head].set_title(f"head {head}")
            axes[row, 1 + head].set(xticks=(), yticks=())
    _save(figure, path)


def _map(axis: Any, probs: np.ndarray) -> None:
    """The square root, since a few keys take almost everything."""
    axis.imshow(np.sqrt(probs), cmap="magma", vmin=0, vmax=1, interpolation="nearest")


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}.") from error


def _figure(**settings: Any) -> Any:
    try:
        figure_class: Any = import_module("matplotlib.figure").Figure  # no window, no global state
    except ModuleNotFoundError as error:
        raise ConfigError("lab show needs matplotlib: pip install 'jaxllm[plot]'.") from error
    return figure_class(**settings)


def _name(picture: Picture, index: int) -> str:
    heads = picture.heads[index]
    if len(picture.heads) == 1:
        return "all heads"
    more = len(picture.heads) - MOST_DRAWN
    left_out = f" ({more} kinds more)" if more > 0 and index == MOST_DRAWN - 1 else ""
    return f"head {', '.join(map(str, heads[:6]))}{', ...' * (len(heads) > 6)}{left_out}"


def _head(part: Any, picture: Picture, index: int, tokens: Sequence[str]) -> None:
    seen, scores, curves = part.subplots(1, 3)
    part.suptitle(_name(picture, index), fontsize="medium")
    _seen(seen, picture, index, tokens)
    seen.set_title("what is seen (black)")
    added = picture.added[index]
    top = max(float(np.nanmax(np.abs(added), initial=0.0)), 1e-3)
    image = scores.imshow(added, cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    scores.set_facecolor("lightgrey")
    scores.set_title("what is added to a score of 1 (grey: hidden)")
    part.colorbar(image, ax=scores)
    _label(scores, tokens)
    _curves(curves, picture, index)


def _seen(axis: Any, picture: Picture, index: int, tokens: Sequence[str]) -> None:
    axis.imshow(picture.visible[index], cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    _label(axis, tokens)


def _label(axis: Any, tokens: Sequence[str]) -> None:
    axis.set(xlabel="key", ylabel="query")
    if not tokens or len(tokens) > _MOST_LABELS:
        return
    size = 8 if len(tokens) <= 20 else 5
    # A dollar sign would begin a formula.
    texts = [token.strip().replace("$", r"\$") or repr(token)[1:-1] for token in tokens]
    axis.set_xticks(range(len(tokens)), texts, rotation=90, fontsize=size)
    axis.set_yticks(range(len(tokens)), texts, fontsize=size)


def _curves(axis: Any, picture: Picture, index: int) -> None:
    axis.plot(SCORES, SCORES, color="grey", linestyle=":", label="plain")
    for distance, curve in zip(picture.distances, picture.curves[index], strict=True):
        if np.isfinite(curve).any():
            axis.plot(SCORES, curve, label=f"{distance} back")
    axis.set_title("what the last token's scores become")
    axis.set(xlabel="score", ylabel="becomes")
    axis.legend()


def _speeds(part: Any, speeds: Sequence[Speed]) -> None:
    axes = part.subplots(1, 2)
    for axis, op in zip(axes, ("decode", "prefill"), strict=True):
        mine = [speed for speed in speeds if speed.op == op]
        x = [speed.context for speed in mine]
        axis.plot(x, [s.plain_seconds * 1e6 for s in mine], marker="o", color="grey", label="plain")
        axis.plot(x, [s.seconds * 1e6 for s in mine], marker="o", label="variant")
        axis.set(xlabel="context", ylabel="us of one layer", xscale="log", ylim=0)
        axis.set_xticks(x, [str(context) for context in x])
        axis.minorticks_off()
        axis.set_title(f"{op}, rows: {mine[0].rows}, by {mine[0].path}")
        axis.legend()
