"""What the device can do at best, measured with plain XLA: reading memory, multiplying matrices."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.bench.timing import median_seconds

_PRODUCTS = 8  # per dispatch


class Ceilings(NamedTuple):
    read_bytes_per_second: float
    matmul_flops_per_second: float


def measure_ceilings() -> Ceilings:
    """Of the default device; takes seconds, and 4 GiB of an accelerator's memory."""
    return Ceilings(read_bytes_per_second(), matmul_flops_per_second())


def read_bytes_per_second() -> float:
    """Sums over 4 GiB (a CPU: 256 MiB), each byte read once; the fastest form of several, because
    XLA's reductions differ."""
    data = jnp.zeros((1 << (14 if _on_cpu() else 18), 4096), jnp.float32)
    forms = (
        jax.jit(lambda x: x.sum()),
        jax.jit(lambda x: x.sum(axis=1)),
        jax.jit(lambda x: x.max(axis=1)),
    )
    times = [
        median_seconds(functools.partial(form, data), queued=8, runs=_runs()) for form in forms
    ]
    return data.nbytes / min(times)


def matmul_flops_per_second() -> float:
    """bfloat16 products of 8192 x 8192 matrices (a CPU: 512 x 512)."""
    size = 512 if _on_cpu() else 8192
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    # The sums keep XLA from making one product of all.
    products = jax.jit(lambda a, b: [(a + i) @ b for i in range(_PRODUCTS)])
    seconds = median_seconds(lambda: products(a, b), calls=_PRODUCTS, queued=1, runs=_runs())
    return 2 * size**3 / seconds


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _runs() -> int:
    return 3 if _on_cpu() else 20
