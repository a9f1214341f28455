"""Heads of a dim that no kernel has."""

import jax.numpy as jnp
import pytest

from pallas_kernels.head_dims import HEAD_DIMS, cut_heads, pad_heads, padded_dim


@pytest.mark.parametrize(
    ("head_dim", "stored"),
    [(80, 128), (96, 128), (112, 128), (48, 64), (160, 256), (192, 256)],
)
def test_the_next_dim_that_a_kernel_has(head_dim: int, stored: int) -> None:
    assert padded_dim(head_dim) == stored


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 32, 72, 100, 512])
def test_a_dim_that_needs_no_padding_or_too_much_of_it_or_none_helps(head_dim: int) -> None:
    assert padded_dim(head_dim) == head_dim


def test_padding_is_zero_and_cut_off_again() -> None:
    x = jnp.ones((2, 3, 80))
    wide = pad_heads(x, 128)
    assert wide.shape == (2, 3, 128)
    assert float(wide.sum()) == x.size
    assert (cut_heads(wide, 80) == x).all()
    assert pad_heads(x, 80) is cut_heads(x, 80) is x
