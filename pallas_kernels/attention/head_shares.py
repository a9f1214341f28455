"""A variant whose query heads are shared out over devices: each computes with its own heads, and
the variant's functions see no difference.

For use inside ``jax.shard_map`` alone, where every device has as many heads, in order.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.attention.variant import KINDS_BY_HEAD, AttentionVariant, Param

FIRST_HEAD = Param("_first_head", "per_layer", dtype="int32")  # of the device


@cache
def shared_out(variant: AttentionVariant, axis: str) -> AttentionVariant:
    """``variant`` on a device that has its share of the heads along the mesh's ``axis``. Its
    functions get the number that a head has among all, which kernels cannot know: they count from
    zero, and what is to be added is one more number that they read.
    """
    functions = {
        name: _of_all_heads(function)
        for name in ("score_mod", "mask_mod")
        if (function := getattr(variant, name)) is not None
    }
    by_head = any(param.kind in KINDS_BY_HEAD for param in variant.params)
    if not functions and not by_head:
        return variant
    params = (*variant.params, FIRST_HEAD) if functions else variant.params
    return replace(variant, **functions, params=params, head_axis=axis)


def own_value(param: Param, num_heads: int, axis: str | None) -> Array:
    """Its default as an array for ``num_heads`` heads: those of this device, if there is an axis
    along which they are shared out.
    """
    if axis is None:
        return jnp.asarray(param.value(num_heads))
    first = lax.axis_index(axis) * num_heads
    if param == FIRST_HEAD:
        return first
    value = jnp.asarray(param.value(num_heads * lax.axis_size(axis)))
    if param.kind not in KINDS_BY_HEAD:
        return value
    return lax.dynamic_slice_in_dim(value, first, num_heads)


def _of_all_heads(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of score_mod or mask_mod: both end with the head and the params."""

    @wraps(function)
    def with_head_of_all(*given: Any) -> Any:
        *before, head, params = given
        values: SimpleNamespace = params
        return function(*before, head + getattr(values, FIRST_HEAD.name), values)

    return with_head_of_all
