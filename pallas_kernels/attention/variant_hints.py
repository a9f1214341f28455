"""What to write instead of an operation that does not lower inside a kernel."""

import re

from pallas_kernels.attention.variant import AttentionVariant

_ELEMENTWISE = "functions see tiles of scores and must compute element by element"
HINTS = {
    "gather": "declare what is looked up as a Param: per_head, per_row or per_distance",
    "dynamic_slice": "declare what is looked up as a Param: per_head, per_row or per_distance",
    "pow": "use jnp.exp2(y * jnp.log2(x))",
    "floor": "use integer division, or astype(jnp.int32) for numbers that are not negative",
    "ceil": "use integer division on positions",
    "round": "use (x + 0.5).astype(jnp.int32) for numbers that are not negative",
    "log1p": "use jnp.log(1.0 + x)",
    "expm1": "use jnp.exp(x) - 1.0",
    "erfc": "use 1.0 - jax.lax.erf(x)",
    "cumsum": _ELEMENTWISE,
    "sort": _ELEMENTWISE,
    "argmax": _ELEMENTWISE,
    "argmin": _ELEMENTWISE,
    "dot_general": _ELEMENTWISE,
    "reduce_sum": _ELEMENTWISE,
    "reduce_max": _ELEMENTWISE,
}


def hint_of(variant: AttentionVariant, error: Exception) -> str:
    """The first line of what the lowering said, and what to do about it."""
    text = str(error)
    said = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    if "captures constants" in text or "should pass them as inputs" in text:
        return f"{variant.name}: a function closes over an array: declare it as a Param"
    if "Register bitwidth in target type" in text:
        return f"{variant.name}: kernels cannot negate a bool: turn the comparison round"
    if "array of dimension 0" in text:  # prefill computes a function of one pair
        return f"{variant.name}: an axis is no part of what a function sees: {_ELEMENTWISE}"
    for name, hint in HINTS.items():
        if re.search(rf"\b{name}(_p)?\b", text):
            return f"{variant.name}: {name} does not lower inside the kernels: {hint}"
    return f"{variant.name} does not lower inside the kernels: {said[:300]}"
