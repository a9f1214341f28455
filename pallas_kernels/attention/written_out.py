"""A variant's functions with what kernels do not have written out in what they have.

Mosaic lowers few operations, and some of them not on every shape. Those that a function computes
without them are traced and evaluated with others in their place, to float32's precision of a score.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from pallas_kernels.attention.variant import VariantError
from pallas_kernels.attention.variant_hints import HINTS

_WHOLE = 2.0**23  # from here on every float32 is a whole number


def written_out(function: Callable[..., Any]) -> Callable[..., Array]:
    """The same function of arrays, and of namespaces and tuples of them."""

    def evaluated(*given: Any) -> Array:
        pair, flat = of_leaves(function, given)
        return _evaluate(jax.make_jaxpr(pair)(flat), flat)[0]

    return evaluated


def of_leaves(
    function: Callable[..., Any],
    given: tuple[Any, ...],
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[Callable[[list[Any]], Array], list[Any]]:
    """A function of namespaces as one of the list of their leaves, and the list."""
    trees = [vars(x) if isinstance(x, SimpleNamespace) else x for x in given]
    flat, tree = jax.tree.flatten(trees, is_leaf=is_leaf)

    def of_list(values: list[Any]) -> Array:
        args = jax.tree.unflatten(tree, values)
        return jnp.asarray(
            function(*(SimpleNamespace(**x) if type(x) is dict else x for x in args))
        )

    return of_list, flat


def _evaluate(closed: Any, given: list[Any]) -> list[Any]:
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, given, strict=True)

    def read(name: Any) -> Any:
        return name.val if hasattr(name, "val") else values[name]

    for equation in closed.jaxpr.eqns:
        operands = [read(name) for name in equation.invars]
        values.update(zip(equation.outvars, _equation(equation, operands), strict=True))
    return [read(name) for name in closed.jaxpr.outvars]


def _equation(equation: Any, operands: list[Any]) -> list[Any]:
    primitive, inner = equation.primitive, inner_of(equation)
    if hint := HINTS.get(primitive.name):
        raise VariantError(f"{primitive.name} does not lower inside the kernels: {hint}")
    if inner is not None and not _stays(equation):
        return _evaluate(inner, operands)
    if rule := _rule_of(equation):
        shape = equation.outvars[0].aval.shape
        return [rule(equation, *(_spread(x, shape) for x in operands))]
    found = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
    return found if primitive.multiple_results else [found]


def inner_of(equation: Any) -> Any:
    """What a call calls, closed; None for an operation."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = next(equation.params[key] for key in ("jaxpr", "call_jaxpr") if key in equation.params)
    return inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ())


def _stays(equation: Any) -> bool:
    """A call of what kernels have: whoever reads on may know it by its name."""
    if equation.primitive.name not in ("jit", "pjit"):
        return False
    for inner in inner_of(equation).jaxpr.eqns:
        if inner.primitive.name in HINTS or _rule_of(inner):
            return False
        if inner_of(inner) is not None and not _stays(inner):
            return False
    return True


def _rule_of(equation: Any) -> Callable[..., Any] | None:
    """None for an operation that kernels have, on what it is given here."""
    name, result = equation.primitive.name, equation.outvars[0].aval
    first = equation.invars[0].aval if equation.invars else result
    is_missing = {
        "select_n": first.shape != result.shape,
        "not": result.dtype == jnp.bool_,
        "convert_element_type": result.dtype == jnp.bool_,
        "rem": jnp.issubdtype(result.dtype, jnp.floating),
    }
    return _RULES.get(name) if is_missing.get(name, True) else None


def _spread(x: Any, shape: tuple[int, ...]) -> Any:
    """A number for a whole tile as the tile."""
    if jnp.shape(x) == shape:
        return x
    if x.dtype == jnp.bool_:  # of which Mosaic makes no tile
        return lax.broadcast(x.astype(jnp.int32), shape) != 0
    return lax.broadcast(x, shape)


def _truncated(x: Any) -> Any:
    return jnp.where(jnp.abs(x) < _WHOLE, x.astype(jnp.int32).astype(x.dtype), x)


def _floor(x: Any) -> Any:
    whole = _truncated(x)
    return jnp.where(whole > x, whole - 1.0, whole)


def _remainder(x: Any, y: Any) -> Any:
    left = x - y * _truncated(x / y)
    # A quotient that was rounded up to a whole number leaves something on the other side of zero.
    beyond = jnp.where(x < 0, -left, left) < 0
    return jnp.where(beyond, left + jnp.where(x < 0, -jnp.abs(y), jnp.abs(y)), left)


def _power(equation: Any, x: Any, y: Any) -> Any:
    exponent, base = equation.invars[1], equation.invars[0]
    if hasattr(exponent, "val"):
        return _fixed_power(x, float(exponent.val))
    y = y.astype(jnp.float32)
    if hasattr(base, "val") and base.val > 0:
        return jnp.exp2(y * math.log2(float(base.val)))
    size = jnp.where(y == 0.0, 1.0, jnp.exp2(y * jnp.log2(jnp.abs(x))))
    half = y * 0.5
    odd = jnp.where(half == _floor(half), 1.0, -1.0)
    return jnp.where(x < 0, size * jnp.where(y == _floor(y), odd, jnp.nan), size)


def _fixed_power(x: Any, y: float) -> Any:
    if y in (0.5, -0.5):
        return jnp.sqrt(x) if y > 0 else lax.rsqrt(x)
    return lax.integer_pow(x, int(y)) if y.is_integer() else jnp.exp2(y * jnp.log2(x))


def _erf(x: Any) -> Any:
    """To 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26)."""
    size = jnp.abs(x)
    t, total = 1.0 / (1.0 + 0.3275911 * size), jnp.zeros_like(x)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        total = (total + factor) * t
    value = 1.0 - total * jnp.exp(-size * size)
    return jnp.where(x < 0, -value, value)


_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")
# Of an equation and its operands, spread. They may use of jax.numpy what has no rule here.
_RULES: dict[str, Callable[..., Any]] = {
    "select_n": lambda e, *x: lax.select_n(*x),
    "not": lambda e, x: x ^ jnp.ones_like(x),
    "convert_element_type": lambda e, x: x != 0,
    "rem": lambda e, x, y: _remainder(x, y),
    "floor": lambda e, x: _floor(x),
    "ceil": lambda e, x: -_floor(-x),
    "pow": _power,
    "erf": lambda e, x: _erf(x),
    "erfc": lambda e, x: 1.0 - _erf(x),
    "log1p": lambda e, x: jnp.log(1.0 + x),
    "expm1": lambda e, x: jnp.exp(x) - 1.0,
    "is_finite": lambda e, x: jnp.abs(x) <= np.finfo(x.dtype).max,
    "stop_gradient": lambda e, x: x,
    "copy": lambda e, x: x,
}
