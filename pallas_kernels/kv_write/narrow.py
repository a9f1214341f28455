"""Keys and values in eight bits, as pages hold them: float8_e4m3fn, kept as bytes.

Bytes, because XLA moves them where they are: to scatter into float8 or gather from it, it makes a
wide copy of the whole cache first. All functions are of use in a kernel too.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

FP8 = "uint8"  # the dtype of pages that hold bytes
_NUMBER = jnp.float8_e4m3fn
_LARGEST = float(jnp.finfo(_NUMBER).max)


def is_narrow(pages: Any) -> bool:
    return jnp.dtype(pages) == jnp.uint8


def narrow(x: Float[Array, "..."], pages: Any) -> Array:
    """``x`` as pages of that dtype hold it, not scaled. In eight bits it is the nearest number
    there is, however far: float8_e4m3fn knows no infinity; XLA makes NaN of what is beyond 448.
    """
    if not is_narrow(pages):
        return x.astype(pages)
    x = jnp.maximum(jnp.minimum(x.astype(jnp.float32), _LARGEST), -_LARGEST)
    return lax.bitcast_convert_type(x.astype(_NUMBER), jnp.uint8)


def widened(x: Array, dtype: Any) -> Float[Array, "..."]:
    """What pages hold, in the dtype of a computation."""
    return (lax.bitcast_convert_type(x, _NUMBER) if is_narrow(x.dtype) else x).astype(dtype)
