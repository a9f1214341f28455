"""How checkpoint tensors become parameters. Data only, no JAX."""

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
