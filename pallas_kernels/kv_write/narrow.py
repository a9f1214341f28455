"""Keys and values as pages of fewer bits hold them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def narrow(x: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """``x`` in the dtype of the pages, not scaled. In eight bits it is the nearest number there is,
    however far: float8_e4m3fn knows no infinity, and XLA makes NaN of what is beyond its 448. Of
    use in a kernel too.
    """
    if jnp.dtype(dtype).itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.maximum(jnp.minimum(x.astype(jnp.float32), largest), -largest)
    return x.astype(dtype)
