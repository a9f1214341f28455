"""What scripts/parity.py wrote, and the comparison with it."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Reference:
    """One prompt's part of a recording; shapes as in scripts/parity.py."""

    token_ids: list[int]
    logsumexp: np.ndarray
    top_ids: np.ndarray
    top_logits: np.ndarray
    full: dict[int, np.ndarray]  # position -> whole logits
    greedy: list[int]
    margins: np.ndarray

    def logits_error(self, logits: np.ndarray) -> float:
        """Largest absolute difference to ``logits`` [T, V], over all that was recorded."""
        peak = logits.max(axis=1, keepdims=True)
        total = np.exp((logits - peak).astype(np.float64)).sum(axis=1)
        logsumexp = peak[:, 0] + np.log(total)
        errors = [
            np.abs(np.take_along_axis(logits, self.top_ids, axis=1) - self.top_logits).max(),
            np.abs(logsumexp - self.logsumexp).max(),
            *(np.abs(logits[position] - whole).max() for position, whole in self.full.items()),
        ]
        return float(max(errors))

    def first_wrong(self, tokens: list[int], *, margin: float = 0.01) -> int | None:
        """Index of the first greedy token that differs although the reference was sure of it.

        After a token that differs where the margin is small the two continue different texts,
        so nothing is compared past it.
        """
        for index, (ours, theirs) in enumerate(zip(tokens, self.greedy, strict=True)):
            if ours != theirs:
                return index if self.margins[index] > margin else None
        return None


def load(path: Path) -> list[Reference]:
    data = np.load(path)
    arrays = {name: data[name] for name in data.files}
    offsets = arrays["offsets"].tolist()
    whole = dict(zip(arrays["full_index"].tolist(), arrays["full_logits"], strict=True))
    references: list[Reference] = []
    for index, (start, stop) in enumerate(pairwise(offsets)):
        reference = Reference(
            token_ids=arrays["tokens"][start:stop].tolist(),
            logsumexp=arrays["logsumexp"][start:stop],
            top_ids=arrays["top_ids"][start:stop],
            top_logits=arrays["top_logits"][start:stop],
            full={at - start: whole[at] for at in range(start, stop) if at in whole},
            greedy=arrays["greedy"][index].tolist(),
            margins=arrays["margins"][index],
        )
        references.append(reference)
    return references
