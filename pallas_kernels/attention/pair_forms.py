"""A variant's functions on a tile of pairs [queries, keys], computed in parts.

A function is written for one pair. What it computes of the query alone is computed once per query
here, what it computes of the key alone once per key, and only what mixes both for every pair: a
thread has 64 pairs but 2 queries and 32 keys. Sums of both stay apart while nothing but sums,
multiples and comparisons are made of them. Of a score, scale and summands are kept aside, so that
they cost one multiply-add.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

_FAR = 2**30  # beyond every difference of positions; twice this is no int32


@dataclass(frozen=True)
class Apart:
    """The sum of a scalar, a number per query [Q] and one per key [K]; None for zero. A bool has
    one of the three."""

    scalar: Array | None = None
    queries: Array | None = None
    keys: Array | None = None

    @property
    def mixes(self) -> bool:
        return self.queries is not None and self.keys is not None

    @property
    def is_scalar(self) -> bool:
        return self.queries is None and self.keys is None

    def map(self, function: Callable[[Array], Array]) -> "Apart":
        parts = (self.scalar, self.queries, self.keys)
        return Apart(*(None if part is None else function(part) for part in parts))


@dataclass(frozen=True)
class Tile:
    """``factor`` (a scalar) times ``pairs`` [Q, K], plus ``rest``."""

    pairs: Array
    factor: Array | None = None
    rest: Apart | None = None


@dataclass(frozen=True)
class Residue:
    """(queries - keys) modulo ``divisor``, of numbers that are taken modulo it already."""

    queries: Array
    keys: Array
    divisor: Array


@dataclass(frozen=True)
class Positions:
    """An int32 that is made only where a function looks at it."""

    make: Callable[[], Apart]


Value = Apart | Tile | Residue


class Forms:
    """Of tiles of one shape. What the place of a tile does not change need not be computed for
    each: ``kept`` of one evaluation serves the evaluations of the same function for other tiles."""

    def __init__(self, shape: tuple[int, int], kept: list[Array] | None = None) -> None:
        self.shape = shape
        self.kept: list[Array] = []
        self._known = iter(kept or [])

    def evaluate(
        self, function: Callable[..., Any], *given: Value | Positions | SimpleNamespace
    ) -> Value:
        """``function`` of values, and of namespaces that hold them (or tuples of them)."""
        flat, tree = jax.tree.flatten(
            [vars(x) if isinstance(x, SimpleNamespace) else x for x in given],
            is_leaf=lambda x: isinstance(x, Value | Positions),
        )

        def pair(values: list[Array]) -> Array:
            args = jax.tree.unflatten(tree, values)
            spaces = [SimpleNamespace(**x) if isinstance(x, dict) else x for x in args]
            return jnp.asarray(function(*spaces))

        closed = jax.make_jaxpr(pair)([jax.ShapeDtypeStruct((), _dtype(x)) for x in flat])
        used = {
            name
            for equation in closed.jaxpr.eqns
            for name in equation.invars
            if not hasattr(name, "val")
        }
        used |= {name for name in closed.jaxpr.outvars if not hasattr(name, "val")}
        made = [
            x.make() if isinstance(x, Positions) and name in used else x
            for name, x in zip(closed.jaxpr.invars, flat, strict=True)
        ]
        return self._run(closed, made)[0]

    def _run(self, closed: Any, given: list[Value]) -> list[Value]:
        jaxpr = closed.jaxpr
        values: dict[Any, Value] = dict(zip(jaxpr.invars, given, strict=True))
        values |= {
            name: Apart(value) for name, value in zip(jaxpr.constvars, closed.consts, strict=True)
        }

        def read(name: Any) -> Value:
            if hasattr(name, "val"):
                return Apart(np.dtype(name.aval.dtype).type(name.val))
            return values[name]

        for equation in jaxpr.eqns:
            operands = [read(name) for name in equation.invars]
            results = self._equation(equation, operands)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(name) for name in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name in ("jit", "pjit", "custom_jvp_call"):
            if params.get("name") == "remainder":
                residue = self._remainder(*operands)
                if residue is not None:
                    return [residue]
            return self._run(params.get("jaxpr") or params["call_jaxpr"], operands)
        rule = _RULES.get(name)
        found = rule(self, *operands) if rule else None
        if found is None and name == "convert_element_type":
            found = _converted(operands[0], params["new_dtype"])
        if found is None and name in _COMPARISONS:
            found = self._compared(equation.primitive, *operands)
        return [self._element_by_element(equation, operands) if found is None else found]

    def _element_by_element(self, equation: Any, operands: list[Value]) -> Value:
        """On the smallest shape that holds all operands."""

        def apply(arrays: list[Array]) -> Array:
            return equation.primitive.bind(*arrays, **equation.params)

        apart = [x for x in operands if isinstance(x, Apart)]
        by_query = any(x.queries is not None for x in apart)
        by_key = any(x.keys is not None for x in apart)
        if len(apart) < len(operands) or (by_query and by_key):
            return Tile(apply([self.tile(x) for x in operands]))
        if by_query:
            return Apart(queries=apply([self.along(x, 0) for x in apart]))
        if by_key:
            return Apart(keys=apply([self.along(x, 1) for x in apart]))
        return Apart(apply([_scalar(x) for x in apart]))

    def along(self, value: Apart, axis: int) -> Array:
        """[Q] or [K] of a value that has no other part than a scalar beside it."""
        part = value.queries if axis == 0 else value.keys
        if part is None:
            return lax.broadcast(_scalar(value), (self.shape[axis],))
        return part if value.scalar is None else part + value.scalar

    def tile(self, value: Value) -> Array:
        """[Q, K]"""
        if isinstance(value, Residue):
            difference = self._spread(value.queries, 0) - self._spread(value.keys, 1)
            wraps = (difference < 0) != (value.divisor < 0)
            wraps &= difference != 0
            return jnp.where(wraps, difference + value.divisor, difference)
        if isinstance(value, Tile):
            pairs = value.pairs if value.factor is None else value.pairs * value.factor
            return pairs if value.rest is None else pairs + self.tile(value.rest)
        if value.mixes:
            queries = self.along(replace(value, keys=None), 0)
            return self._spread(queries, 0) + self._spread(value.keys, 1)
        if value.queries is not None:
            return self._spread(self.along(value, 0), 0)
        if value.keys is not None:
            return self._spread(self.along(value, 1), 1)
        return lax.broadcast(_scalar(value), self.shape)

    def _spread(self, part: Any, axis: int) -> Array:
        return lax.broadcast_in_dim(part, self.shape, (axis,))

    def _compared(self, primitive: Any, x: Value, y: Value) -> Value | None:
        """What queries say on one side, what keys say on the other: one comparison a pair."""
        if isinstance(x, Residue) and _is_zero(y) and primitive.name in ("eq", "ne"):
            return Tile(primitive.bind(self._spread(x.queries, 0), self._spread(x.keys, 1)))
        if not isinstance(x, Apart) or not isinstance(y, Apart) or not (x.mixes or y.mixes):
            return None
        if _dtype(x) != jnp.int32:
            return None
        difference = _subtracted(self, _bounded(x), _bounded(y))
        assert isinstance(difference, Apart)
        if not difference.mixes:
            return None
        queries = self.along(replace(difference, keys=None), 0)
        keys: Any = difference.keys
        return Tile(primitive.bind(self._spread(queries, 0), self._spread(-keys, 1)))

    def _remainder(self, x: Value, y: Value) -> Residue | None:
        """Of a sum of queries' and keys' numbers: those of keys are divided once for all tiles."""
        if not (isinstance(x, Apart) and isinstance(y, Apart) and x.mixes and y.is_scalar):
            return None
        if _dtype(x) != jnp.int32:
            return None
        divisor, keys = _scalar(y), x.keys
        assert keys is not None
        found = next(self._known, None)
        self.kept.append((-keys) % divisor if found is None else found)
        queries = self.along(replace(x, keys=None), 0) % divisor
        return Residue(queries, self.kept[-1], divisor)


def _scalar(value: Apart) -> Array:
    assert value.scalar is not None
    return value.scalar


def _dtype(value: Value | Positions) -> Any:
    if isinstance(value, Positions):
        return jnp.dtype(jnp.int32)
    if isinstance(value, Apart):
        parts = (value.scalar, value.queries, value.keys)
        return next(part.dtype for part in parts if part is not None)
    return (value.pairs if isinstance(value, Tile) else value.keys).dtype


def _is_zero(value: Value) -> bool:
    """Whether it was written as one."""
    known = isinstance(value, Apart) and isinstance(value.scalar, np.ndarray | np.generic)
    return known and value.is_scalar and not np.any(value.scalar)


def _bounded(value: Apart) -> Apart:
    """Numbers that stand for "no limit" must not overflow where they meet positions."""
    if not value.is_scalar:
        return value
    return Apart(lax.clamp(jnp.int32(-_FAR), _scalar(value), jnp.int32(_FAR)))


def _joined(x: Apart, y: Apart, sign: int) -> Apart:
    def both(x: Any, y: Any) -> Any:
        if y is None:
            return x
        if x is None:
            return y if sign > 0 else -y
        return x + y if sign > 0 else x - y

    return Apart(both(x.scalar, y.scalar), both(x.queries, y.queries), both(x.keys, y.keys))


def _added(forms: Forms, x: Value, y: Value) -> Value | None:
    if isinstance(x, Apart) and isinstance(y, Apart):
        return _joined(x, y, 1)
    if isinstance(x, Apart):
        x, y = y, x
    if isinstance(x, Tile) and isinstance(y, Apart):
        return replace(x, rest=y if x.rest is None else _joined(x.rest, y, 1))
    return None


def _subtracted(forms: Forms, x: Value, y: Value) -> Value | None:
    if isinstance(x, Apart) and isinstance(y, Apart):
        return _joined(x, y, -1)
    if isinstance(y, Apart):
        return _added(forms, x, y.map(operator.neg))
    return None


def _scaled(x: Value, factor: Array) -> Value | None:
    if isinstance(x, Apart):
        return x.map(lambda part: part * factor)
    if isinstance(x, Tile) and x.pairs.dtype == jnp.float32:
        rest = None if x.rest is None else x.rest.map(lambda part: part * factor)
        return Tile(x.pairs, factor if x.factor is None else x.factor * factor, rest)
    return None


def _multiplied(forms: Forms, x: Value, y: Value) -> Value | None:
    if isinstance(x, Apart) and x.is_scalar:
        x, y = y, x
    return _scaled(x, _scalar(y)) if isinstance(y, Apart) and y.is_scalar else None


def _divided(forms: Forms, x: Value, y: Value) -> Value | None:
    scalar = isinstance(y, Apart) and y.is_scalar and _dtype(y) == jnp.float32
    return _scaled(x, 1.0 / _scalar(y)) if scalar and isinstance(y, Apart) else None


def _converted(x: Value, dtype: Any) -> Value | None:
    """Sums of positions are exact in float32 up to 2 ** 24."""
    if isinstance(x, Apart) and _dtype(x) == jnp.int32 and dtype == jnp.float32:
        return x.map(lambda part: part.astype(jnp.float32))
    return x if _dtype(x) == dtype else None


def _selected(forms: Forms, which: Value, no: Value, yes: Value) -> Value | None:
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
    chosen = lax.select_n(*(forms.along(x, axis) for x in parts))
    return replace(no, rest=Apart(queries=chosen) if by_query else Apart(keys=chosen))


_RULES: dict[str, Callable[..., Value | None]] = {
    "add": _added,
    "sub": _subtracted,
    "neg": lambda forms, x: _scaled(x, jnp.asarray(-1, _dtype(x))),
    "mul": _multiplied,
    "div": _divided,
    "select_n": _selected,
    "copy": lambda forms, x: x,
}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
