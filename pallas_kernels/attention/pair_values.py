"""What a variant's functions have on a tile of pairs [queries, keys], held in parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# An Array, or a number of numpy where a function has it written down.
Scalar = Any


@dataclass(frozen=True)
class Apart:
    """The sum of a scalar, a number per query [Q] and one per key [K]; None for zero. A bool has
    one of the three."""

    scalar: Scalar | None = None
    queries: Array | None = None
    keys: Array | None = None
    is_still: bool = False  # whether ``keys`` are the same for every tile

    @property
    def mixes(self) -> bool:
        return self.queries is not None and self.keys is not None

    @property
    def is_scalar(self) -> bool:
        return self.queries is None and self.keys is None

    def map(self, function: Callable[[Any], Any]) -> "Apart":
        parts = (self.scalar, self.queries, self.keys)
        mapped = (None if part is None else function(part) for part in parts)
        return Apart(*mapped, is_still=self.is_still)

    def along(self, axis: int, size: int) -> Array:
        """[Q] or [K] of a value that has no other part than a scalar beside it."""
        part = self.queries if axis == 0 else self.keys
        if part is None:
            return lax.broadcast(scalar_of(self), (size,))
        return part if self.scalar is None else part + self.scalar


@dataclass(frozen=True)
class Tile:
    """``factor`` (a scalar) times ``pairs`` [Q, K], plus ``rest``."""

    pairs: Array
    factor: Scalar | None = None
    rest: Apart | None = None


@dataclass(frozen=True)
class Residue:
    """(queries - keys) modulo ``divisor``, of numbers that are taken modulo it already."""

    queries: Array
    keys: Array
    divisor: Scalar


@dataclass(frozen=True)
class Positions:
    """An int32 that is made only where a function looks at it."""

    make: Callable[[], Apart]


Value = Apart | Tile | Residue


def scalar_of(value: Apart) -> Any:
    assert value.scalar is not None
    return value.scalar


def dtype_of(value: Value | Positions) -> Any:
    if isinstance(value, Positions):
        return jnp.dtype(jnp.int32)
    if isinstance(value, Apart):
        parts = (value.scalar, value.queries, value.keys)
        return next(part.dtype for part in parts if part is not None)
    return (value.pairs if isinstance(value, Tile) else value.keys).dtype
