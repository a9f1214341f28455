"""Stretches of keys that a mask shows nothing of are not visited, and all others are."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variants.block_global import BLOCK_GLOBAL
from pallas_kernels.attention.xla_queries import SPAN, make_tile_map
from pallas_kernels.attention.xla_spans import Sight, SpanMap, decode_spans, prefill_spans

PAGE, PAGES = 32, 40
BLOCKS = BLOCK_GLOBAL.bind({"block": 256, "num_global": 64})


def visited(spans: SpanMap, group: int) -> list[int]:
    return np.asarray(spans.order[group, : int(spans.count[group])]).tolist()


def test_a_decoding_row_visits_its_blocks_and_the_first_tokens() -> None:
    sight = Sight(None, BLOCKS, None, PAGE, (3, PAGES))
    spans = decode_spans(jnp.array([1200, 100, 0], jnp.int32), 4, sight)
    assert spans.order.shape == (3, PAGES * PAGE // SPAN)
    assert visited(spans, 0) == [0, 6, 7, 8, 9]  # keys 768 to 1199, and 0 to 63
    assert visited(spans, 1) == [0]
    assert visited(spans, 2) == []


def test_a_tile_visits_what_any_of_its_queries_or_heads_sees() -> None:
    def seen(q_pos, kv_pos, head, params):
        return (kv_pos >= q_pos - 1) | ((head == 3) & (kv_pos < 1) & (q_pos == 260))

    sight = Sight(None, AttentionVariant("seen", mask_mod=seen), None, PAGE, (1, PAGES))
    positions = jnp.arange(250, 320, dtype=jnp.int32)  # tiles of 32 queries: to 281, 313, 319
    start, lens = jnp.array([0, 70], jnp.int32), jnp.array([320], jnp.int32)
    tiles = make_tile_map(start, jnp.int32(0), 70)
    spans = prefill_spans(positions, tiles, lens, 4, sight)
    assert [visited(spans, tile) for tile in range(3)] == [[0, 1, 2], [2], [2]]
