"""Forgetting attention (Lin et al. 2025, arXiv:2503.02130): what a token forgets of all before it
is taken off their logits. ``decay`` is the sum of the logarithms of the forget gates up to a token,
so that between a key and a query lies a difference of two numbers.
"""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

from jaxtyping import Array

from pallas_kernels.attention.variant import CAUSAL, AttentionVariant, Param

DECAY = Param("decay", "per_token")


@cache
def forgetting(variant: AttentionVariant) -> AttentionVariant:
    """``variant`` with forgetting: a window, a prefix that sees ahead and so on stay."""
    before = variant.score_mod

    def forget(
        score: Array, q_pos: Array, kv_pos: Array, head: Array, params: SimpleNamespace
    ) -> Array:
        if before is not None:
            score = before(score, q_pos, kv_pos, head, params)
        return score + (params.decay.query - params.decay.key)

    name = "forgetting" if variant is CAUSAL else f"{variant.name} with forgetting"
    return replace(variant, name=name, score_mod=forget, params=(*variant.params, DECAY))


FORGETTING = forgetting(CAUSAL)
