"""Whether a mask shows all of a block of keys to all of a tile of queries, from the first and last
positions of both: interval arithmetic on what the mask computes.

Scalars only, so that a kernel can ask before every block. It answers yes only where it is certain:
an operation that is not known here, or numbers of tokens, make it a no that is known when tracing,
and what leaves the range of its type is asked pair by pair, as the mask itself wraps there.
"""

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.attention.jnp_calls import is_call_of
from pallas_kernels.attention.variant import MaskMod

_INT = jnp.iinfo(jnp.int32)
_POSITION = 2.0**29  # beyond every position: differences and sums of few need no check
_FITS = 2.0**31 * (1 - 2.0**-20)  # less than float32 could round to beyond an int32


class Bounds(NamedTuple):
    """Of a number: smallest and largest, the same object for one that is known; NaN for an end that
    is not. Of a bool: whether it must and whether it may be true."""

    low: Array
    high: Array
    most: float = float("inf")  # beyond its magnitude, as far as that is known when tracing

    @property
    def is_known(self) -> bool:
        return self.low is self.high

    @property
    def dtype(self) -> Any:
        return self.low.dtype


_Known = Bounds | None  # None: anything


def seen_whole(
    mask_mod: MaskMod, query: Bounds, key: Bounds, head: Array, params: SimpleNamespace
) -> Array | None:
    """A bool scalar. ``params`` are scalars or trees of them, a ShapeDtypeStruct for each that is
    no single number here. The answer is None if it can never be yes."""
    names, given = list(vars(params)), list(vars(params).values())
    flat, tree = jax.tree.flatten(given)

    def mask(q_pos: Array, kv_pos: Array, head: Array, values: list[Array]) -> Array:
        own = SimpleNamespace(**dict(zip(names, jax.tree.unflatten(tree, values), strict=True)))
        return jnp.asarray(mask_mod(q_pos, kv_pos, head, own))

    facts = [_shape_of(x) for x in (query.low, key.low, head)]
    closed = jax.make_jaxpr(mask)(*facts, [_shape_of(x) for x in flat])
    values = [None if isinstance(x, jax.ShapeDtypeStruct) else Bounds(x, x) for x in flat]
    query, key = query._replace(most=_POSITION), key._replace(most=_POSITION)
    found = _evaluate(closed.jaxpr, closed.consts, [query, key, Bounds(head, head), *values])[0]
    return None if found is None else found.low


def _shape_of(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), value.dtype)


def _evaluate(jaxpr: Any, consts: Any, given: list[_Known]) -> list[_Known]:
    values: dict[Any, _Known] = dict(zip(jaxpr.invars, given, strict=True))
    for name, value in zip(jaxpr.constvars, consts, strict=True):
        values[name] = Bounds(value, value) if jnp.ndim(value) == 0 else None

    def read(name: Any) -> _Known:
        if not hasattr(name, "val"):
            return values[name]
        value = jnp.asarray(name.val, name.aval.dtype)
        is_int = name.aval.dtype == jnp.int32
        return Bounds(value, value, abs(int(name.val)) if is_int else float("inf"))

    for equation in jaxpr.eqns:
        known = [read(name) for name in equation.invars]
        results: list[_Known] = [None] * len(equation.outvars)
        if equation.primitive.name in ("jit", "pjit"):
            results = _call(equation, known)
        elif len(results) == 1:
            results = [_apply(equation, known)]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(name) for name in jaxpr.outvars]


def _call(equation: Any, known: list[_Known]) -> list[_Known]:
    closed = equation.params["jaxpr"]
    is_int = equation.outvars[0].aval.dtype == jnp.int32
    if is_int and is_call_of(jnp.floor_divide, equation):
        return [_divided(operator.floordiv, *known)]
    return _evaluate(closed.jaxpr, closed.consts, known)


def _apply(equation: Any, known: list[_Known]) -> _Known:
    name, dtype = equation.primitive.name, equation.outvars[0].aval.dtype
    if name in ("and", "or") and dtype == jnp.bool_:
        return _both_or_either(name, known)
    bounds = [x for x in known if x is not None]
    if len(bounds) < len(known):
        return None
    if all(x.is_known for x in bounds) and name in (*_RULES, *_OF_KNOWN):
        value = equation.primitive.bind(*[x.low for x in bounds], **equation.params)
        return Bounds(value, value)
    if name == "convert_element_type":
        return _converted(bounds[0], equation.params["new_dtype"])
    if name == "not" and dtype == jnp.bool_:
        return Bounds(~bounds[0].high, ~bounds[0].low)
    return _RULES[name](*bounds) if name in _RULES else None


def _both_or_either(name: str, known: list[_Known]) -> _Known:
    """One that is not known may be true and need not be: the other may decide."""
    if known[0] is None and known[1] is None:
        return None
    x, y = (b or Bounds(jnp.bool_(False), jnp.bool_(True)) for b in known)
    if name == "and":
        return Bounds(x.low & y.low, x.high & y.high)
    return Bounds(x.low | y.low, x.high | y.high)


def _ends(
    function: Callable[..., Array], low: tuple[Array, ...], high: tuple[Array, ...], most: float
) -> Bounds:
    """Of a function that is smallest and largest, or the reverse, of these operands."""
    first, last = function(*low), function(*high)
    if jnp.issubdtype(first.dtype, jnp.floating):
        return Bounds(_finite(first), _finite(last))
    if most < 2**31:
        return Bounds(first, last, most)
    fits = _fits(function, low) & _fits(function, high)
    return Bounds(jnp.where(fits, first, _INT.min), jnp.where(fits, last, _INT.max))


def _finite(value: Array) -> Array:
    return jnp.where(jnp.abs(value) <= jnp.finfo(value.dtype).max, value, jnp.nan)


def _fits(function: Callable[..., Array], given: tuple[Array, ...]) -> Array:
    """Whether the result is an int32, asked of floats."""
    return jnp.abs(function(*(x.astype(jnp.float32) for x in given))) < _FITS


def _multiplied(x: Bounds, y: Bounds) -> _Known:
    """By a number that is known: it grows or falls with the other."""
    if x.is_known:
        x, y = y, x
    if not y.is_known:
        return None
    return _sorted(_ends(operator.mul, (x.low, y.low), (x.high, y.low), x.most * y.most))


def _divided(function: Callable[..., Array], x: _Known, y: _Known) -> _Known:
    if x is None or y is None or not y.is_known:
        return None
    if x.is_known:
        value = function(x.low, y.low)
        return Bounds(value, value)
    return _sorted(_ends(function, (x.low, y.low), (x.high, y.low), x.most))


def _sorted(x: Bounds) -> Bounds:
    return Bounds(lax.min(x.low, x.high), lax.max(x.low, x.high), x.most)


def _converted(x: Bounds, dtype: Any) -> _Known:
    """Between types where the order stays and nothing wraps."""
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if dtype == x.dtype:
        return x
    if jnp.issubdtype(dtype, jnp.floating) or (dtype == jnp.int32 and x.dtype == jnp.bool_):
        return _ends(lambda x: x.astype(dtype), (x.low,), (x.high,), 1)
    if dtype != jnp.int32 or not is_float:
        return None
    fits = _fits(lambda x: x, (x.low,)) & _fits(lambda x: x, (x.high,))
    low, high = x.low.astype(dtype), x.high.astype(dtype)
    return Bounds(jnp.where(fits, low, _INT.min), jnp.where(fits, high, _INT.max))


def _selected(which: Bounds, no: Bounds, yes: Bounds) -> _Known:
    if no.dtype == jnp.bool_:
        return None
    low = jnp.where(which.low, yes.low, jnp.where(which.high, lax.min(no.low, yes.low), no.low))
    high = jnp.where(
        which.low, yes.high, jnp.where(which.high, lax.max(no.high, yes.high), no.high)
    )
    return Bounds(low, high, max(no.most, yes.most))


def _compared(must: Array, may: Array, x: Bounds, y: Bounds) -> _Known:
    if x.dtype == jnp.bool_:
        return None
    if jnp.issubdtype(x.dtype, jnp.floating):  # an end that is not known says nothing
        for end in (x.low, x.high, y.low, y.high):
            may = may | (end != end)
    return Bounds(must, may)


def _equal(x: Bounds, y: Bounds) -> _Known:
    must = (x.high <= y.low) & (x.low >= y.high)
    return _compared(must, (x.low <= y.high) & (x.high >= y.low), x, y)


def _unequal(x: Bounds, y: Bounds) -> _Known:
    must = (x.low > y.high) | (x.high < y.low)
    return _compared(must, (x.low < y.high) | (x.high > y.low), x, y)


_RULES: dict[str, Callable[..., _Known]] = {
    "add": lambda x, y: _ends(operator.add, (x.low, y.low), (x.high, y.high), x.most + y.most),
    "sub": lambda x, y: _ends(operator.sub, (x.low, y.high), (x.high, y.low), x.most + y.most),
    "mul": _multiplied,
    "neg": lambda x: _ends(lax.neg, (x.high,), (x.low,), x.most),
    "max": lambda x, y: Bounds(lax.max(x.low, y.low), lax.max(x.high, y.high), max(x.most, y.most)),
    "min": lambda x, y: Bounds(lax.min(x.low, y.low), lax.min(x.high, y.high), max(x.most, y.most)),
    "lt": lambda x, y: _compared(x.high < y.low, x.low < y.high, x, y),
    "le": lambda x, y: _compared(x.high <= y.low, x.low <= y.high, x, y),
    "gt": lambda x, y: _compared(x.low > y.high, x.high > y.low, x, y),
    "ge": lambda x, y: _compared(x.low >= y.high, x.high >= y.low, x, y),
    "eq": _equal,
    "ne": _unequal,
    "select_n": _selected,
    "div": lambda x, y: _divided(lax.div, x, y),
}
_OF_KNOWN = (
    "rem",
    "and",
    "or",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "convert_element_type",
)
