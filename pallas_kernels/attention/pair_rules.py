"""Operations on values in parts that leave them in parts."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.pair_values import (
    Apart,
    Tile,
    Value,
    dtype_of,
    scalar_of,
)

Shape = tuple[int, int]


def _joined(x: Apart, y: Apart, sign: int) -> Apart:
    def both(x: Any, y: Any) -> Any:
        if y is None:
            return x
        if x is None:
            return y if sign > 0 else -y
        return x + y if sign > 0 else x - y

    parts = both(x.scalar, y.scalar), both(x.queries, y.queries), both(x.keys, y.keys)
    return Apart(*parts, is_still=all(value.is_still for value in (x, y) if value.keys is not None))


def _added(shape: Shape, x: Value, y: Value) -> Value | None:
    if isinstance(x, Apart) and isinstance(y, Apart):
        return _joined(x, y, 1)
    if isinstance(x, Apart):
        x, y = y, x
    if isinstance(x, Tile) and isinstance(y, Apart):
        return replace(x, rest=y if x.rest is None else _joined(x.rest, y, 1))
    return None


def subtracted(shape: Shape, x: Value, y: Value) -> Value | None:
    if isinstance(x, Apart) and isinstance(y, Apart):
        return _joined(x, y, -1)
    if isinstance(y, Apart):
        return _added(shape, x, y.map(operator.neg))
    return None


def _scaled(x: Value, factor: Any) -> Value | None:
    if isinstance(x, Apart):
        return x.map(lambda part: part * factor)
    if isinstance(x, Tile) and x.pairs.dtype == jnp.float32:
        rest = None if x.rest is None else x.rest.map(lambda part: part * factor)
        return Tile(x.pairs, factor if x.factor is None else x.factor * factor, rest)
    return None


def _negated(shape: Shape, x: Value) -> Value | None:
    unsigned = jnp.issubdtype(dtype_of(x), jnp.unsignedinteger)
    return None if unsigned else _scaled(x, jnp.asarray(-1, dtype_of(x)))


def _multiplied(shape: Shape, x: Value, y: Value) -> Value | None:
    if isinstance(x, Apart) and x.is_scalar:
        x, y = y, x
    return _scaled(x, scalar_of(y)) if isinstance(y, Apart) and y.is_scalar else None


def _divided(shape: Shape, x: Value, y: Value) -> Value | None:
    if not (isinstance(y, Apart) and y.is_scalar and dtype_of(y) == jnp.float32):
        return None
    return _scaled(x, 1.0 / scalar_of(y))


def converted(x: Value, dtype: Any) -> Value | None:
    """Sums of positions are exact in float32 up to 2 ** 24."""
    if isinstance(x, Apart) and dtype_of(x) == jnp.int32 and dtype == jnp.float32:
        return x.map(lambda part: part.astype(jnp.float32))
    return x if dtype_of(x) == dtype else None


def _selected(shape: Shape, which: Value, no: Value, yes: Value) -> Value | None:
    """Between a score with one summand and the same with another: between the summands."""
    if not (isinstance(which, Apart) and isinstance(no, Tile) and isinstance(yes, Tile)):
        return None
    if no.pairs is not yes.pairs or no.factor is not yes.factor:
        return None
    summands = [Apart(jnp.float32(0)) if x.rest is None else x.rest for x in (no, yes)]
    parts = (which, *summands)
    by_query = any(x.queries is not None for x in parts)
    by_key = any(x.keys is not None for x in parts)
    if by_query and by_key:
        return None
    if not by_query and not by_key:
        return None
    axis = 0 if by_query else 1
    chosen = lax.select_n(*(x.along(axis, shape[axis]) for x in parts))
    return replace(no, rest=Apart(queries=chosen) if by_query else Apart(keys=chosen))


# Of one operation each, and of tiles of one shape; None where it must be done element by element.
RULES: dict[str, Callable[..., Value | None]] = {
    "add": _added,
    "sub": subtracted,
    "neg": _negated,
    "mul": _multiplied,
    "div": _divided,
    "select_n": _selected,
    "copy": lambda shape, x: x,
}
