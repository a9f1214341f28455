"""A backend bound to a step: what lands in the cache, by the fused way and by the plain one."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.attention.backend import AttentionSpec, HeadTransform
from jaxllm.attention.backends.xla import BACKEND
from jaxllm.attention.metadata import AttentionMetadata, StepAttention
from jaxllm.config.model import RopeConfig
from jaxllm.config.plan import BatchKind
from jaxllm.layers.norm import RMSNorm
from jaxllm.layers.rotary import apply_rotary, rotary_table

SPEC = AttentionSpec(4, 2, 16, scale=0.25)
PAGE, PAGES, TOKENS = 8, 7, 12
TABLES = np.array([[5, 2, 0], [3, 6, 0]], np.int32)

# Slot 0 feeds its tokens 6..12, slot 1 its tokens 0..2; the last two are padding.
POSITIONS = np.array([*range(6, 13), 0, 1, 2, -1, -1], np.int32)
SLOTS = np.array([0] * 7 + [1] * 5, np.int32)


def _step() -> StepAttention:
    metadata = AttentionMetadata(
        positions=jnp.asarray(POSITIONS),
        token_slots=jnp.asarray(SLOTS),
        query_start_loc=jnp.asarray([0, 7, 10], jnp.int32),
        seq_lens=jnp.asarray([13, 3], jnp.int32),
        block_tables=jnp.asarray(TABLES),
        num_decode_rows=jnp.asarray(0, jnp.int32),
    )
    return StepAttention.bind(BACKEND, metadata, BatchKind.MIXED, (SPEC,), PAGE)


def _normal(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_every_token_lands_on_its_page_and_padding_nowhere() -> None:
    k, v, kv = (
        _normal(0, TOKENS, 2, 16),
        _normal(1, TOKENS, 2, 16),
        _normal(2, PAGES, 2, 2, PAGE, 16),
    )
    got, want = np.asarray(_step().write_pages(k, v, kv)), np.array(kv)
    for token, (slot, position) in enumerate(zip(SLOTS, POSITIONS, strict=True)):
        if position >= 0:
            page = TABLES[slot, position // PAGE]
            want[page, :, :, position % PAGE] = np.stack([k[token], v[token]])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=1e4, dim=16),
        RopeConfig(theta=1e4, dim=8),
        RopeConfig(theta=1e4, dim=8, interleaved=True),
    ],
    ids=["whole", "half", "interleaved"],
)
def test_a_fused_projection_equals_q_k_v_made_by_the_layer(rope: RopeConfig, normed: bool) -> None:
    """What a layer may do by itself, from the same parts that models are made of."""
    step, qkv, kv = _step(), _normal(0, TOKENS, 8 * 16), _normal(1, PAGES, 2, 2, PAGE, 16)
    table = rotary_table(rope, jnp.maximum(jnp.asarray(POSITIONS), 0))
    q, k, v = jnp.split(qkv.reshape(TOKENS, 8, 16), [4, 6], axis=1)
    weights = [None, None]
    if normed:
        norms = [RMSNorm(16, 1e-5, dtype=jnp.dtype("float32")) for _ in "qk"]
        weights = [_normal(2, 16), _normal(3, 16)]
        for norm, weight in zip(norms, weights, strict=True):
            norm.weight[...] = weight
        q, k = norms[0](q), norms[1](k)
    q = apply_rotary(q, table, rope)
    written = step.write_pages(apply_rotary(k, table, rope), v, kv)

    heads = HeadTransform(*table, rope.interleaved, *weights, eps=1e-5)
    got_q, got_kv = step.write(qkv, kv, heads, SPEC)
    np.testing.assert_array_equal(got_q, q)
    np.testing.assert_array_equal(got_kv, written)
    np.testing.assert_array_equal(step(got_q, got_kv, SPEC), step(q, written, SPEC))
