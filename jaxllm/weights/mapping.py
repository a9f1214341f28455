"""How checkpoint tensors become parameters. Data only, no JAX."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightRule:
    """``target`` = the ``sources`` concatenated along ``axis``, cast to the engine's dtype.

    Weights keep Hugging Face's ``[out, in]`` order, so fusing q/k/v or gate/up is a concatenation
    of rows and nothing is ever transposed.
    """

    target: str  # path in the parameter tree: "layers.0.attention.qkv.weight"
    sources: tuple[str, ...]  # tensor names in a Hugging Face checkpoint
    axis: int = 0
    split: tuple[int, int] | None = None  # (part, of): take one of equal parts of the single source


def linear_rules(target: str, sources: Sequence[str], bias: bool) -> list[WeightRule]:
    """Of a product whose rows are those of ``sources``, one after the other."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [
        WeightRule(f"{target}.{kind}", tuple(f"{source}.{kind}" for source in sources))
        for kind in kinds
    ]
