"""What the engine read at single positions, put together by name."""

from collections.abc import Sequence

import numpy as np

from jaxllm.messages import TapValue
from jaxllm.outputs import Tap


def taps_by_name(read: Sequence[TapValue]) -> dict[str, Tap]:
    """Of attention probabilities, keys that a position does not see have zeros."""
    by_name: dict[str, list[TapValue]] = {}
    for value in read:
        by_name.setdefault(value.name, []).append(value)
    return {name: _tap(name, values) for name, values in by_name.items()}


def _tap(name: str, values: Sequence[TapValue]) -> Tap:
    positions = [value.position for value in values]
    rows = [np.frombuffer(value.data, "<f4").astype(np.float32) for value in values]
    if not name.startswith("attn_probs"):
        return Tap(positions, np.stack(rows))
    heads, keys = rows[0].size // (positions[0] + 1), max(positions) + 1
    array = np.zeros((len(rows), heads, keys), np.float32)
    for index, (position, row) in enumerate(zip(positions, rows, strict=True)):
        array[index, :, : position + 1] = row.reshape(heads, -1)
    return Tap(positions, array)
