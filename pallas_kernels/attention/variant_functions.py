"""Whether a variant's functions can be traced, and give what they should.

What is wrong with one is said here, by its name, before the rest of a check meets it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jaxtyping import Array

from pallas_kernels.attention.variant import AttentionVariant, VariantError
from pallas_kernels.attention.variant_check import Case, by_xla, make_case
from pallas_kernels.attention.variant_hints import ELEMENTWISE, tracing_hint
from pallas_kernels.attention.variant_params import kv_spans, param_arrays
from pallas_kernels.attention.written_out import inner_of, of_leaves


def check_functions(variant: AttentionVariant) -> None:
    """That the functions can be traced, and give what they should for a tile.

    Raises:
        VariantError: names the function and what is wrong with it.
    """
    case = make_case(variant.without_values())
    if variant.kv_range is not None:
        _check_range(variant, case)
    for name, function, wanted in (
        ("score_mod", variant.score_mod, "a float32 score for every pair"),
        ("mask_mod", variant.mask_mod, "a bool for every pair"),
    ):
        if function is not None:
            _check_result(f"{variant.name}: {name}", _watched(variant, name), case, wanted)
    try:
        jax.eval_shape(lambda: by_xla(case))
    except VariantError:
        raise
    except Exception as error:
        raise VariantError(
            f"{variant.name} cannot be traced: {tracing_hint(variant, error)}"
        ) from error


def _check_range(variant: AttentionVariant, case: Case) -> None:
    """``kv_range`` of one group of queries."""
    kv_range: Any = variant.kv_range
    where, found = f"{variant.name}: kv_range", list[Any]()

    def watched(first: Array, last: Array, params: Any) -> tuple[Any, Any]:
        found.append(kv_range(first, last, params))
        return first, last

    arrays = param_arrays(variant, case.spec.heads, len(case.spec.rows) + 1, case.row_params)
    one = jnp.zeros(1, jnp.int32)
    watching = dataclasses.replace(variant, kv_range=watched)
    try:
        jax.eval_shape(lambda: kv_spans(watching, arrays, one, one, one, one))
    except Exception as error:
        raise VariantError(f"{where} cannot be traced: {tracing_hint(variant, error)}") from error
    (given,) = found
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise VariantError(f"{where} must give two positions: return first, last")
    for value in given:
        dtype, shape = jnp.result_type(value), jnp.shape(value)
        if shape or not jnp.issubdtype(dtype, jnp.integer):
            raise VariantError(
                f"{where} must give two whole numbers, not {dtype}{list(shape)}; a per_head param "
                "holds all heads' numbers there: take its .max() or .min()"
            )


def _watched(variant: AttentionVariant, name: str) -> Callable[..., AttentionVariant]:
    """The variant with a function that tells ``seen`` the type of its results."""
    function: Any = getattr(variant, name)

    def with_(seen: list[Any]) -> AttentionVariant:
        def score(s: Any, q: Any, k: Any, h: Any, params: Any) -> Any:
            result = _of_each_pair(function, s, q, k, h, params)
            seen.append((jnp.result_type(result), jnp.shape(result), jnp.shape(s)))
            return s

        def mask(q: Any, k: Any, h: Any, params: Any) -> Any:
            result = _of_each_pair(function, q, k, h, params)
            seen.append((jnp.result_type(result), jnp.shape(result), None))
            return k <= q

        return dataclasses.replace(variant, **{name: score if name == "score_mod" else mask})

    return with_


_ALONG_AN_AXIS = {"sort", "dot_general", "rev", "slice"}
_ALONG_AN_AXIS |= {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}


def _of_each_pair(function: Any, *given: Any) -> Array:
    """What it gives. Raises VariantError where pairs of a tile would change each other."""
    of_list, flat = of_leaves(function, given)
    closed = jax.make_jaxpr(of_list)(flat)
    name = _mixes(closed.jaxpr, max(np.ndim(x) for x in flat))
    if name is not None:
        raise VariantError(f"{name} mixes pairs: {ELEMENTWISE}")
    return eval_jaxpr(closed.jaxpr, closed.consts, *flat)[0]


def _mixes(jaxpr: Any, rank: int) -> str | None:
    """An operation along an axis of a tile, of so many."""
    for equation in jaxpr.eqns:
        inner, name = inner_of(equation), equation.primitive.name
        if inner is not None and (found := _mixes(inner.jaxpr, rank)):
            return found
        is_tile = any(operand.aval.ndim >= rank for operand in equation.invars)
        shrinks = equation.outvars[0].aval.ndim < rank and "axes" in equation.params
        if is_tile and (shrinks or name in _ALONG_AN_AXIS):
            return name
    return None


def _check_result(where: str, watched: Any, case: Case, wanted: str) -> None:
    seen: list[Any] = []
    variant = watched(seen)
    try:
        jax.eval_shape(lambda: by_xla(dataclasses.replace(case, variant=variant.without_values())))
    except Exception as error:
        raise VariantError(f"{where} cannot be traced: {tracing_hint(variant, error)}") from error
    for dtype, shape, scores in seen:
        kind_ok = dtype == (jnp.bool_ if scores is None else jnp.float32)
        fits = scores is None or _fits(shape, scores)
        if not kind_ok or not fits:
            raise VariantError(
                f"{where} must give {wanted}, not {dtype}{list(shape)}; params are those of the "
                "pair's head and row already"
            )


def _fits(shape: tuple[int, ...], tile: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, tile) == tile
    except ValueError:
        return False
