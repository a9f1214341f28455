"""Relative position bias by distance, as T5's decoder has it (Raffel et al. 2019,
arXiv:1910.10683): a table over 32 buckets of distance, written out up to the last bucket.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace

from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, Param

BUCKETS, MAX_DISTANCE = 32, 128


def bucket(distance: int) -> int:
    """Half the buckets are exact, the others grow logarithmically up to ``MAX_DISTANCE``."""
    exact = BUCKETS // 2
    if distance < exact:
        return max(distance, 0)
    grown = math.log(distance / exact) / math.log(MAX_DISTANCE / exact) * (BUCKETS - exact)
    return min(exact + int(grown), BUCKETS - 1)


def by_distance(table: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """A checkpoint's table [32, H] as the param takes it, [H, 129]."""
    heads = range(len(table[0]))
    places = [bucket(distance) for distance in range(MAX_DISTANCE + 1)]
    return tuple(tuple(table[place][head] for place in places) for head in heads)


def _bias(score: Array, q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace) -> Array:
    return score + params.bias


T5_BIAS = AttentionVariant(
    "t5_bias",
    score_mod=_bias,
    params=(Param("bias", "per_distance", default=0.0, size=MAX_DISTANCE + 1),),
)
