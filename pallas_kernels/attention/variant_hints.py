"""What to write instead of what cannot be traced or does not lower inside a kernel."""

from pallas_kernels.attention.variant import AttentionVariant, VariantError

ELEMENTWISE = "functions see tiles of scores and must compute element by element"
_PARAM = "declare what is looked up as a Param: per_head, per_row or per_distance"
_CURVE = "a function of the distance may be a per_distance Param"
# By the operation's name. Others that Mosaic lacks are written out (written_out.py).
HINTS = {
    "gather": _PARAM,
    "dynamic_slice": _PARAM,
    "iota": _PARAM,
    "argmax": "nest jnp.where instead of jnp.select",
    "concatenate": "declare what it holds as Params",
    "scan": "write the loop in Python, which unrolls it",
    "while": "write the loop in Python, which unrolls it",
    "cond": "use jnp.where",
    "cbrt": "use jnp.sign(x) * jnp.abs(x) ** (1 / 3)",
    "sinh": "use (jnp.exp(x) - jnp.exp(-x)) / 2",
    "cosh": "use (jnp.exp(x) + jnp.exp(-x)) / 2",
    "tan": "use jnp.sin(x) / jnp.cos(x)",
    "atan": _CURVE,
    "atan2": _CURVE,
    "asin": _CURVE,
    "acos": _CURVE,
    "lgamma": _CURVE,
    "digamma": _CURVE,
    "erf_inv": _CURVE,
    "random_bits": "a token's number may be a per_token Param",
    "random_seed": "a token's number may be a per_token Param",
    "population_count": _CURVE,
}
_NUMBERS = "Python's range, float and math and NumPy take constants only: use jax.numpy"
_CHOICE = "use jnp.where, &, | and ~ in place of if, and, or, not, lax.select and lax.cond"
_TRACING = {
    "truth value": _CHOICE,
    "converted to a scalar index": _NUMBERS,
    "converted to Python scalars": _NUMBERS,
    "__array__": _NUMBERS,
    "concrete value": _NUMBERS,
    "must be a scalar": _CHOICE,
    "`which` must be scalar": _CHOICE,
    "None is not a valid": "a function must return what it computes",
    "has no attribute 'astype'": "for one number everywhere give an array: score * 0 + 1.0",
    "'tuple'": "a per_row param with a size is a tuple of numbers: params.NAME[0]",
}


def hint_of(variant: AttentionVariant, error: Exception) -> str:
    """The first line of what the lowering said, and what to do about it."""
    text = str(error)
    if isinstance(error, VariantError):
        return f"{variant.name}: {text}"
    if "array constants" in text or "should pass them as inputs" in text:
        return f"{variant.name}: a function holds an array: declare it as a Param"
    if "array of dimension 0" in text:  # prefill computes a function of one pair
        return f"{variant.name}: an axis is no part of what a function sees: {ELEMENTWISE}"
    return f"{variant.name} does not lower inside the kernels: {_first_line(error)}"


def tracing_hint(variant: AttentionVariant, error: Exception) -> str:
    """The same of a function that JAX cannot trace at all."""
    text = str(error)
    if "SimpleNamespace" in text:
        known = ", ".join(param.name for param in variant.params) or "none"
        return f"{_first_line(error)}; params of {variant.name}: {known}"
    hints = (hint for part, hint in _TRACING.items() if part in text)
    return "; ".join([_first_line(error), *([hint] if (hint := next(hints, None)) else [])])


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300].rstrip(".")
