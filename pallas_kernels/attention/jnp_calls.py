"""Which jitted calls inside a variant's functions are jax.numpy's own."""

from collections.abc import Callable
from typing import Any

import jax


def is_call_of(function: Callable[..., Any], equation: Any) -> bool:
    """Whether an equation calls the ``jax.numpy`` function given. Its name is not enough: one of
    the user's may have it.
    """
    if equation.params.get("name") != function.__name__:
        return False
    avals = [operand.aval for operand in equation.invars]
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
    try:
        own = jax.make_jaxpr(function)(*specs).eqns[0]
    except TypeError:  # what it does not take is no call of it
        return False
    return str(own.params.get("jaxpr")) == str(equation.params.get("jaxpr"))
