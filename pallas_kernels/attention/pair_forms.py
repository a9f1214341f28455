"""A variant's functions on a tile of pairs [queries, keys], computed in parts.

A function is written for one pair. What it computes of the query alone is computed once per query
here, what it computes of the key alone once per key, and only what mixes both for every pair: a
thread has 64 pairs but 2 queries and 32 keys. Sums of both stay apart while nothing but sums,
multiples and comparisons are made of them. Of a score, scale and summands are kept aside, so that
they cost one multiply-add.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_kernels.attention.jnp_calls import is_call_of
from pallas_kernels.attention.pair_rules import RULES, converted, subtracted
from pallas_kernels.attention.pair_values import (
    Apart,
    Positions,
    Residue,
    Tile,
    Value,
    dtype_of,
    scalar_of,
)
from pallas_kernels.attention.variant import VariantError
from pallas_kernels.attention.written_out import inner_of, of_leaves, written_out

_FAR = 2**30  # beyond every difference of positions; twice this is no int32


class Forms:
    """Of tiles of one shape. What the place of a tile does not change need not be computed for
    each: ``kept`` of one evaluation serves the evaluations of the same function for other tiles."""

    def __init__(self, shape: tuple[int, int], kept: list[Array] | None = None) -> None:
        self.shape = shape
        self.kept: list[Array] = []
        self._known = iter(kept or [])
        self._rounds = True  # whether floats held in parts, which rounds otherwise, will do

    def evaluate(
        self, function: Callable[..., Any], *given: Value | Positions | SimpleNamespace
    ) -> Value:
        """``function`` of values, and of namespaces that hold them (or tuples of them)."""

        def is_leaf(x: Any) -> bool:
            return isinstance(x, Value | Positions)

        pair, flat = of_leaves(function, given, is_leaf)
        specs = [jax.ShapeDtypeStruct((), dtype_of(x)) for x in flat]
        closed = jax.make_jaxpr(written_out(pair))(specs)
        self._rounds = not _has_steps(closed.jaxpr)
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

    def _run(self, closed: Any, given: Sequence[Any]) -> list[Value]:
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
        if any(result.aval.shape for result in equation.outvars):
            raise VariantError("a function makes an array in the kernel: declare it as a Param")
        inner = inner_of(equation)
        if inner is not None:
            if is_call_of(jnp.remainder, equation):
                residue = self._remainder(*operands)
                if residue is not None:
                    return [residue]
            return self._run(inner, operands)
        rule = RULES.get(name)
        may_round = self._rounds or not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
        found = rule(self.shape, *operands) if rule and may_round else None
        if found is None and name == "convert_element_type" and may_round:
            found = converted(operands[0], params["new_dtype"])
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
        return Apart(apply([scalar_of(x) for x in apart]))

    def along(self, value: Apart, axis: int) -> Array:
        return value.along(axis, self.shape[axis])

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
        return lax.broadcast(scalar_of(value), self.shape)

    def _spread(self, part: Any, axis: int) -> Array:
        return lax.broadcast_in_dim(part, self.shape, (axis,))

    def _compared(self, primitive: Any, x: Value, y: Value) -> Value | None:
        """What queries say on one side, what keys say on the other: one comparison a pair."""
        if isinstance(x, Residue) and _is_zero(y) and primitive.name in ("eq", "ne"):
            return Tile(primitive.bind(self._spread(x.queries, 0), self._spread(x.keys, 1)))
        if not isinstance(x, Apart) or not isinstance(y, Apart) or not (x.mixes or y.mixes):
            return None
        if dtype_of(x) != jnp.int32:
            return None
        difference = subtracted(self.shape, self._bounded(x), self._bounded(y))
        assert isinstance(difference, Apart)
        if not difference.mixes:
            return None
        queries = self.along(replace(difference, keys=None), 0)
        keys: Any = difference.keys
        return Tile(primitive.bind(self._spread(queries, 0), self._spread(-keys, 1)))

    def _remainder(self, x: Value, y: Value) -> Residue | None:
        """Of a sum of queries' and keys' numbers: those of keys are divided once for all tiles,
        unless they are others in every tile."""
        if not (isinstance(x, Apart) and isinstance(y, Apart) and x.mixes and y.is_scalar):
            return None
        if dtype_of(x) != jnp.int32:
            return None
        divisor = scalar_of(y)
        negated: Any = x.map(operator.neg).keys
        found = next(self._known, None) if x.is_still else None
        keys = negated % divisor if found is None else found
        if x.is_still:
            self.kept.append(keys)
        queries = self.along(replace(x, keys=None), 0) % divisor
        return Residue(queries, keys, divisor)

    def _bounded(self, value: Apart) -> Apart:
        """Numbers that stand for "no limit" must not overflow where they meet positions."""
        if value.mixes:
            return value
        if value.is_scalar:
            return Apart(lax.clamp(jnp.int32(-_FAR), scalar_of(value), jnp.int32(_FAR)))
        axis = 0 if value.keys is None else 1
        part = jnp.clip(self.along(value, axis), -_FAR, _FAR)
        return Apart(queries=part) if axis == 0 else Apart(keys=part)


def _is_zero(value: Value) -> bool:
    """Whether it was written as one."""
    if not (isinstance(value, Apart) and value.is_scalar):
        return False
    return isinstance(value.scalar, np.ndarray | np.generic) and not np.any(value.scalar)


def _has_steps(jaxpr: Any) -> bool:
    """Whether the last bit of a float may decide: at a step, or which side of it something is."""
    for equation in jaxpr.eqns:
        inner, name = inner_of(equation), equation.primitive.name
        of_float = any(jnp.issubdtype(x.aval.dtype, jnp.floating) for x in equation.invars)
        if name == "convert_element_type":
            of_float &= not jnp.issubdtype(equation.params["new_dtype"], jnp.floating)
        is_step = name in ("convert_element_type", "round", "sign", *_COMPARISONS)
        if (is_step and of_float) or (inner is not None and _has_steps(inner.jaxpr)):
            return True
    return False


_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
