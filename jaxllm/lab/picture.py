"""What an attention variant does to the scores of one row, as numbers to be drawn."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from pallas_kernels.attention.reference import modified_scores
from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_params import default_pairs, param_arrays

SCORES = np.linspace(-8, 8, 65, dtype=np.float32)


@dataclass(frozen=True)
class Picture:
    """Of N tokens, each a query and a key; heads of which several see and score alike are drawn as
    one.
    """

    heads: tuple[tuple[int, ...], ...]  # of each drawn one
    visible: Bool[np.ndarray, "G N N"]
    added: Float[np.ndarray, "G N N"]  # to a score of one, by what multiplies too; NaN: hidden
    distances: tuple[int, ...]
    curves: Float[np.ndarray, "G S C"]  # what SCORES become for a key so far back; NaN: hidden
    changes_scores: bool  # or only hides


def make_picture(variant: AttentionVariant, num_heads: int, num_tokens: int) -> Picture:
    """By the functions of the float32 reference, whose answers all others are compared with."""
    visible, from_one = _modified(variant, num_heads, num_tokens, 1.0)
    added = from_one - 1
    back = sorted({0, 1, num_tokens // 4, num_tokens - 1} & set(range(num_tokens)))
    ends = [_modified(variant, num_heads, num_tokens, float(score))[1][:, -1] for score in SCORES]
    curves = np.stack(ends, axis=-1)[:, [num_tokens - 1 - distance for distance in back]]
    groups: dict[bytes, list[int]] = {}
    for head in range(num_heads):
        same = added[head].tobytes() + visible[head].tobytes() + curves[head].tobytes()
        groups.setdefault(same, []).append(head)
    first = [heads[0] for heads in groups.values()]
    names = tuple(tuple(heads) for heads in groups.values())
    changes = variant.score_mod is not None
    return Picture(names, visible[first], added[first], tuple(back), curves[first], changes)


def _modified(
    variant: AttentionVariant, num_heads: int, num_tokens: int, score: float
) -> tuple[np.ndarray, np.ndarray]:
    """Visible and scores, [H, N, N], where all were ``score``."""
    scores, visible = modified_scores(
        jnp.full((num_tokens, num_heads, num_tokens), score, jnp.float32),
        jnp.zeros(num_tokens, jnp.int32),
        jnp.arange(num_tokens, dtype=jnp.int32),
        variant,
        param_arrays(variant, num_heads, 1, None),
        seq_lens=jnp.asarray([num_tokens], jnp.int32),
        tokens=default_pairs(variant, num_heads),
    )
    scores = jnp.where(visible, scores, jnp.nan)
    return np.asarray(visible).swapaxes(0, 1), np.asarray(scores).swapaxes(0, 1)
