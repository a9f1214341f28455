"""What all kernels for Hopper ask of where they run and of what they compute with."""

from typing import Any

import jax.numpy as jnp


def refuses_hopper(kernel: str, dtype: Any, platform: str) -> str | None:
    """None if there is tensor-core arithmetic for it, else the reason. ``kernel`` is its name in
    that."""
    if platform != "sm_90":
        return f"{kernel} is built for sm_90, not {platform}"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"{kernel} takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    return None
