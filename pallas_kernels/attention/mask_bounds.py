"""Whether a mask shows all of a block of keys to all of a tile of queries, from the first and last
positions of both: interval arithmetic on what the mask computes.

Scalars only, so that a kernel can ask before every block. It answers yes only where it is certain:
an operation that is not known here, or numbers of tokens, make it a no that is known when tracing.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.attention.variant import MaskMod


class Bounds(NamedTuple):
    """Of a number: smallest and largest, the same object for one that is known. Of a bool: whether
    it must and whether it may be true."""

    low: Array
    high: Array

    @property
    def is_known(self) -> bool:
        return self.low is self.high


_Known = Bounds | None  # None: anything


def seen_whole(
    mask_mod: MaskMod, query: Bounds, key: Bounds, head: Array, params: SimpleNamespace
) -> Array | None:
    """A bool scalar. ``params`` are scalars or tuples of them; None for what is none. The answer
    is None if it can never be yes."""
    names, given = list(vars(params)), list(vars(params).values())
    flat, tree = jax.tree.flatten(given, is_leaf=lambda value: value is None)
    shown = [jnp.float32(0) if value is None else value for value in flat]

    def mask(q_pos: Array, kv_pos: Array, head: Array, values: list[Array]) -> Array:
        own = SimpleNamespace(**dict(zip(names, jax.tree.unflatten(tree, values), strict=True)))
        return jnp.asarray(mask_mod(q_pos, kv_pos, head, own))

    facts = [_shape_of(x) for x in (query.low, key.low, head)]
    closed = jax.make_jaxpr(mask)(*facts, [_shape_of(x) for x in shown])
    values = [None if value is None else Bounds(value, value) for value in flat]
    found = _evaluate(closed.jaxpr, closed.consts, [query, key, Bounds(head, head), *values])[0]
    return None if found is None else found.low


def _shape_of(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jnp.result_type(value))


def _evaluate(jaxpr: Any, consts: Any, given: list[_Known]) -> list[_Known]:
    values: dict[Any, _Known] = dict(zip(jaxpr.invars, given, strict=True))
    for name, value in zip(jaxpr.constvars, consts, strict=True):
        values[name] = Bounds(value, value) if jnp.ndim(value) == 0 else None

    def read(name: Any) -> _Known:
        if not hasattr(name, "val"):
            return values[name]
        value = jnp.asarray(name.val, name.aval.dtype)
        return Bounds(value, value)

    for equation in jaxpr.eqns:
        known = [read(name) for name in equation.invars]
        if equation.primitive.name in ("jit", "pjit"):
            results = _call(equation, known)
        else:
            results = [_apply(equation, known)]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(name) for name in jaxpr.outvars]


def _call(equation: Any, known: list[_Known]) -> list[_Known]:
    closed = equation.params["jaxpr"]
    if equation.params["name"] == "floor_divide":
        return [_at_both_ends(lambda x, y: x // y, known)]
    return _evaluate(closed.jaxpr, closed.consts, known)


def _apply(equation: Any, known: list[_Known]) -> _Known:
    name = equation.primitive.name
    if name in ("and", "or") and equation.outvars[0].aval.dtype == jnp.bool_:
        return _both_or_either(name, known)
    if any(bounds is None for bounds in known):
        return None
    if name in _RULES:
        return _RULES[name](*known)
    if name == "convert_element_type":
        return _mapped(lambda x: x.astype(equation.params["new_dtype"]), known[0])
    if name == "not" and equation.outvars[0].aval.dtype == jnp.bool_:
        (x,) = known
        return Bounds(~x.high, ~x.low)
    if name in _OF_KNOWN and all(bounds.is_known for bounds in known if bounds):
        value = equation.primitive.bind(*[b.low for b in known if b], **equation.params)
        return Bounds(value, value)
    return None


def _both_or_either(name: str, known: list[_Known]) -> _Known:
    """One that is not known may be true and need not be: the other may decide."""
    if known[0] is None and known[1] is None:
        return None
    x, y = (b or Bounds(jnp.bool_(False), jnp.bool_(True)) for b in known)
    if name == "and":
        return Bounds(x.low & y.low, x.high & y.high)
    return Bounds(x.low | y.low, x.high | y.high)


def _mapped(function: Callable[[Array], Array], x: Bounds) -> Bounds:
    """Of a function that grows."""
    low = function(x.low)
    return Bounds(low, low if x.is_known else function(x.high))


def _sorted(x: Array, y: Array) -> Bounds:
    return Bounds(lax.min(x, y), lax.max(x, y))


def _at_both_ends(function: Callable[[Array, Array], Array], known: list[_Known]) -> _Known:
    """Of a function that grows or falls with its first argument, where the second is known."""
    x, y = known
    if x is None or y is None or not y.is_known:
        return None
    if x.is_known:
        value = function(x.low, y.low)
        return Bounds(value, value)
    return _sorted(function(x.low, y.low), function(x.high, y.low))


def _add(x: Bounds, y: Bounds) -> Bounds:
    low = x.low + y.low
    return Bounds(low, low if x.is_known and y.is_known else x.high + y.high)


def _sub(x: Bounds, y: Bounds) -> Bounds:
    low = x.low - y.high
    return Bounds(low, low if x.is_known and y.is_known else x.high - y.low)


def _mul(x: Bounds, y: Bounds) -> _Known:
    return _at_both_ends(lambda a, b: a * b, [y, x] if x.is_known else [x, y])


def _select(which: Bounds, no: Bounds, yes: Bounds) -> _Known:
    if no.low.dtype == jnp.bool_:
        return None
    low = jnp.where(which.low, yes.low, jnp.where(which.high, lax.min(no.low, yes.low), no.low))
    high = jnp.where(
        which.low, yes.high, jnp.where(which.high, lax.max(no.high, yes.high), no.high)
    )
    return Bounds(low, high)


def _equal(x: Bounds, y: Bounds) -> Bounds:
    must = (x.high <= y.low) & (x.low >= y.high)
    return Bounds(must, (x.low <= y.high) & (x.high >= y.low))


def _unequal(x: Bounds, y: Bounds) -> Bounds:
    must = (x.low > y.high) | (x.high < y.low)
    return Bounds(must, (x.low < y.high) | (x.high > y.low))


_RULES: dict[str, Callable[..., _Known]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "neg": lambda x: Bounds(-x.high, -x.low),
    "max": lambda x, y: Bounds(lax.max(x.low, y.low), lax.max(x.high, y.high)),
    "min": lambda x, y: Bounds(lax.min(x.low, y.low), lax.min(x.high, y.high)),
    "lt": lambda x, y: Bounds(x.high < y.low, x.low < y.high),
    "le": lambda x, y: Bounds(x.high <= y.low, x.low <= y.high),
    "gt": lambda x, y: Bounds(x.low > y.high, x.high > y.low),
    "ge": lambda x, y: Bounds(x.low >= y.high, x.high >= y.low),
    "eq": _equal,
    "ne": _unequal,
    "select_n": _select,
    "div": lambda x, y: _at_both_ends(lax.div, [x, y]),
}
_OF_KNOWN = ("rem", "and", "or", "shift_left", "shift_right_arithmetic", "shift_right_logical")
