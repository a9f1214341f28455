"""Attention without positions (NoPE, Kazemnejad et al. 2023, arXiv:2305.19466): the causal mask
alone tells order. Models mix such layers with rotary ones (SmolLM3, Llama 4).
"""

from typing import override

import jax.numpy as jnp

from jaxllm.attention.backend import HeadTransform
from jaxllm.layers.attention import Attention
from jaxllm.layers.rotary import RotaryTable


class NoPEAttention(Attention):
    """Turns all heads by angle 0, which changes no bit of them: so the kernel that writes rotated
    keys serves unrotated ones too.
    """

    @override
    def _heads(self, table: RotaryTable) -> HeadTransform:
        return super()._heads(RotaryTable(jnp.ones_like(table.cos), jnp.zeros_like(table.sin)))
