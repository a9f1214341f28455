"""Activations mean what Hugging Face means by their names."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_matmul.activations import XLA_ACTIVATIONS


def tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_pytorch_tanh", tanh_gelu),
    ],
)
def test_activation(name: str, exact) -> None:
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    want = [exact(float(value)) for value in x]
    np.testing.assert_allclose(XLA_ACTIVATIONS[name](jnp.asarray(x)), want, atol=2e-6)
