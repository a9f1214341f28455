"""Blocks of keys that a mask hides whole are not fetched by the kernels, and all others are."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.page_map import PageMap, decode_map, prefill_map
from pallas_kernels.attention.prefill_specs import PrefillSpec
from pallas_kernels.attention.prefill_tiles import PrefillConfig, make_prefill_tiles
from pallas_kernels.attention.variant import AttentionVariant
from pallas_kernels.attention.variant_check import (
    by_kernels,
    largest_error,
    make_case,
    reference,
)
from pallas_kernels.attention.variants.block_global import BLOCK_GLOBAL
from pallas_kernels.attention.variants.prefix_lm import PREFIX_LM
from pallas_kernels.attention.xla_spans import Sight

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")

PAGE, PAGES = 32, 20
BLOCKS = BLOCK_GLOBAL.bind({"block": 32, "num_global": 128})
CONFIG = PrefillConfig(block_kv=64)


def listed(found: PageMap, group: int) -> tuple[list[int], list[int]]:
    """Blocks seen in part, and whole."""
    partials, count = np.asarray(found.counts[group]).tolist()
    order = np.asarray(found.order[group]).tolist()
    return order[:partials], order[partials:count]


def test_a_decoding_row_walks_what_it_sees_in_order() -> None:
    sight = Sight(None, BLOCKS, None, PAGE, (3, PAGES))
    found = decode_map(jnp.array([600, 100, 0], jnp.int32), 4, sight, 64)
    assert listed(found, 0) == ([0, 1, 8, 9], [])  # keys to 127, and from 544 on
    assert listed(found, 1) == ([0, 1], [])
    assert listed(found, 2) == ([], [])


def tiles_of(cached: int, new: int) -> PageMap:
    start, lens = jnp.array([0, new], jnp.int32), jnp.array([cached + new], jnp.int32)
    tiles = make_prefill_tiles(start, lens, jnp.int32(0), new, CONFIG)
    assert int(tiles.count[0]) == 1
    sight = Sight(None, BLOCKS, None, PAGE, (1, PAGES))
    return prefill_map(tiles, 4, sight, CONFIG)


def test_a_tile_knows_what_all_of_its_queries_see() -> None:
    # The first 128 keys; and of the tile's queries 448 to 487 keys from 416 on.
    assert listed(tiles_of(448, 40), 0) == ([6, 7], [0, 1])
    # A query at 64 sees no key of the second block but its own.
    assert listed(tiles_of(64, 40), 0) == ([1], [0])


def test_what_one_head_sees_counts_for_all_of_a_tile() -> None:
    def seen(q_pos, kv_pos, head, params):
        return (kv_pos >= q_pos - 1) | ((head == 3) & (kv_pos == 70) & (q_pos == 300))

    start, lens = jnp.array([0, 40], jnp.int32), jnp.array([320], jnp.int32)
    tiles = make_prefill_tiles(start, lens, jnp.int32(0), 40, CONFIG)
    sight = Sight(None, AttentionVariant("seen", mask_mod=seen), None, PAGE, (1, PAGES))
    assert listed(prefill_map(tiles, 4, sight, CONFIG), 0) == ([1, 4], [])


def test_a_prefix_that_sees_ahead_is_walked_to_its_end() -> None:
    start, lens = jnp.array([0, 150], jnp.int32), jnp.array([150], jnp.int32)
    tiles = make_prefill_tiles(start, lens, jnp.int32(0), 150, CONFIG)
    brought = {"prefix_len": jnp.array([140], jnp.int32)}
    found = prefill_map(tiles, 4, Sight(None, PREFIX_LM, brought, PAGE, (1, PAGES)), CONFIG)
    first = np.asarray(tiles.table[:, 1]).tolist().index(0)
    assert listed(found, first) == ([2], [0, 1])


def test_the_kernels_read_nothing_of_what_is_hidden_whole() -> None:
    """Of 400 keys both rows see the first 128 (a tile all of them) and the last; NaN lies between,
    in one block of prefill's, and more of decode's."""
    spec = PrefillSpec("hidden", 2, 1, 64, PAGE, ((399, 1), (384, 16)), 1, 7)
    case = make_case(BLOCKS, spec=spec, dtype="bfloat16")
    want = np.asarray(reference(case))
    hidden = case.problem.block_tables[:2, 4:8]
    problem = case.problem._replace(kv=case.problem.kv.at[hidden].set(jnp.nan))
    decoded, prefilled = by_kernels(dataclasses.replace(case, problem=problem), interpret=True)
    assert largest_error(decoded[:1], want[:1]) <= 4e-3
    assert largest_error(prefilled[1:17], want[1:17]) <= 4e-3
