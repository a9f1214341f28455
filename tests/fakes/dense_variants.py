"""Every attention variant in NumPy, written from the papers: whole matrices of scores and masks."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fakes.dense_model import Change, Seen

Values = dict[str, Any]  # of the variant's params


def positions(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """Of queries [T, 1] and keys [1, T]."""
    at = np.arange(seen.scores.shape[-1])
    return at[:, None], at[None]


def heads(values: Any) -> np.ndarray:
    return np.asarray(values)[:, None, None]


def hide(seen: Seen, visible: np.ndarray) -> Seen:
    return seen._replace(visible=seen.visible & visible)


def add(seen: Seen, bias: np.ndarray) -> Seen:
    return seen._replace(scores=seen.scores + bias)


def sliding_window(seen: Seen, values: Values) -> Seen:
    q, k = positions(seen)
    return hide(seen, k > q - values["window"])


def softcap(seen: Seen, values: Values) -> Seen:
    cap = values["cap"]
    return seen._replace(scores=cap * np.tanh(seen.scores / cap))


def alibi(seen: Seen, values: Values) -> Seen:
    q, k = positions(seen)
    return add(seen, heads(values["slopes"]) * (k - q))


def sinks(seen: Seen, values: Values) -> Seen:
    return seen._replace(sink=heads(values["sink"]))


def prefix_lm(seen: Seen, values: Values) -> Seen:
    inside = [at < values["prefix_len"] for at in positions(seen)]
    return seen._replace(visible=seen.visible | inside[0] & inside[1])


def document_mask(seen: Seen, values: Values) -> Seen:
    q, k = (np.searchsorted(values["starts"], at, "right") for at in positions(seen))
    return hide(seen, q == k)


def t5_bias(seen: Seen, values: Values) -> Seen:
    q, k = positions(seen)
    return add(seen, np.asarray(values["bias"])[:, np.maximum(q - k, 0)])


def dilated(seen: Seen, values: Values) -> Seen:
    q, k = positions(seen)
    return hide(seen, q % values["stride"] == k % values["stride"])


def block_global(seen: Seen, values: Values) -> Seen:
    q, k = positions(seen)
    blocks = q // values["block"] - k // values["block"]
    return hide(seen, (blocks <= 1) | (k < values["num_global"]))


def head_windows(seen: Seen, values: Values) -> Seen:
    q, k = positions(seen)
    return hide(seen, k > q - heads(values["windows"]))


def request_bias(seen: Seen, values: Values) -> Seen:
    k, (first, end) = positions(seen)[1], values["span"]
    return add(seen, values["bias"] * ((first <= k) & (k < end)))


def of_tokens(seen: Seen, values: list[float]) -> np.ndarray:
    """Zero for tokens that the request has brought nothing for."""
    out = np.zeros(seen.scores.shape[-1])
    out[: len(values)] = values
    return out


def token_bias(seen: Seen, values: Values) -> Seen:
    return add(seen, of_tokens(seen, values["token_bias"]))


def forgetting(seen: Seen, values: Values) -> Seen:
    sums = of_tokens(seen, values["decay"])
    return add(seen, sums[:, None] - sums)


VARIANTS: dict[str, Callable[[Seen, Values], Seen]] = {
    "causal": lambda seen, values: seen,
    "sliding_window": sliding_window,
    "softcap": softcap,
    "alibi": alibi,
    "sinks": sinks,
    "prefix_lm": prefix_lm,
    "document_mask": document_mask,
    "t5_bias": t5_bias,
    "dilated": dilated,
    "block_global": block_global,
    "head_windows": head_windows,
    "request_bias": request_bias,
    "token_bias": token_bias,
    "forgetting": forgetting,
}


def change(name: str, values: Values) -> Change:
    return lambda seen: VARIANTS[name](seen, values)
